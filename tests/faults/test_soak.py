"""Hundreds of calls without growth of memory, and threads that do not see each other."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from fastgrpo import FusedLM, LossConfig
from fastgrpo.objective.presets import PRESETS
from fastgrpo.testing import make_batch
from loss_routes import ROUTES, Outcome, run
from model_families import VOCAB, tiny
from oracle import valid_batch

THREADS = 8
SHAPES = ((3, 4, 53), (2, 7, 257), (1, 1, 2))  # sequences, length, vocabulary

# ---- memory ------------------------------------------------------------------------------------

CALLS = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
sys.path[:0] = {paths!r}
from fastgrpo import LossConfig
from fastgrpo.objective.presets import PRESETS
from fastgrpo.testing import LiveBytes, make_batch
from loss_routes import ROUTES, run

torch.set_num_threads(1)
batches = [
    make_batch(sequences=4, length=length, vocab=vocab, hidden_size=64)
    for length, vocab in ((16, 2048), (64, 2051), (5, 4096))
]
losses = [
    LossConfig.preset(name, **({{"max_completion_length": 64}} if name == "dr_grpo" else {{}}))
    for name in PRESETS
]

def calls(n):
    for i in range(n):
        batch = batches[i % len(batches)]
        route = list(ROUTES)[i % len(ROUTES)]
        given = {{}}
        if route in ("loss", "loss over a support", "loss with an adapter"):
            given = dict(config=losses[i % len(losses)], ref_logps=batch.ref_logps)
            given["sampler_logps"] = batch.sampler_logps
        run(route, batch, **given)

def memory():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    return int(line.split()[1]) / 1024, tensors

with LiveBytes():
    calls(300)
before, tensors = memory()
with LiveBytes(batches) as live:
    calls(300)
after, tensors_after = memory()
print(json.dumps(dict(grown=after - before, tensors=tensors_after - tensors, live=live.live)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_300_calls_leave_nothing():
    """No tensor, and no memory beyond 2 MiB, after 300 calls like them.

    That is what the process went up and down by over 3,900 calls. A weight has half a MiB or more:
    of 20 routes one that kept its gradient would show, as would all of them if they kept their
    (N, H). glibc gives memory back from the end of its heap alone. A mapping of its own for
    whatever has 64 KiB, and one arena, leave few holes.
    """
    child = subprocess.run(
        [sys.executable, "-c", CALLS.format(paths=sys.path)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
             "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    seen = json.loads(child.stdout)
    assert seen["tensors"] == seen["live"] == 0
    assert seen["grown"] <= 2, seen


# ---- threads -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_core_each():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tasks() -> list[Callable[[], Outcome]]:
    """Every route with every shape, and the losses in turn."""
    losses = [LossConfig.preset(name) for name in PRESETS if name != "dr_grpo"]
    some = []
    for i, (route, shape) in enumerate(itertools.product(ROUTES, SHAPES)):
        sequences, length, vocab = shape
        batch = valid_batch(
            sequences=sequences, length=length, vocab=vocab, hidden_size=16, seed=i
        )  # fmt: skip
        given = {}
        if route in ("loss", "loss over a support", "loss with an adapter"):
            given = dict(config=losses[i % len(losses)], ref_logps=batch.ref_logps)
            given["sampler_logps"] = batch.sampler_logps
        some.append(lambda route=route, batch=batch, given=given: run(route, batch, **given))
    return some


def at_once(works: list[Callable[[], object]]) -> list[object]:
    """Return what each function returns in a thread of its own; they begin together."""
    begin, results = threading.Barrier(len(works)), [None] * len(works)

    def worker(i: int) -> None:
        begin.wait(30)
        try:
            results[i] = works[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def assert_equal(actual: object, wanted: Outcome) -> None:
    assert isinstance(actual, Outcome), actual
    for x, y in zip(actual, wanted, strict=True):
        assert torch.equal(x, y)


def test_eight_threads_make_the_same_call_at_once():
    for task in tasks():
        wanted = task()
        for result in at_once([task] * THREADS):
            assert_equal(result, wanted)


def test_eight_threads_make_other_calls_at_once():
    """Each makes all of them, from another one on."""
    some = tasks()
    wanted = [task() for task in some]

    def all_from(first: int) -> Callable[[], list]:
        order = [(first + i) % len(some) for i in range(len(some))]
        return lambda: [(i, some[i]()) for i in order]

    step = len(some) // THREADS
    for results in at_once([all_from(k * step) for k in range(THREADS)]):
        assert not isinstance(results, Exception), results
        for i, result in results:
            assert_equal(result, wanted[i])


def test_a_thread_that_raises_leaves_the_others_alone():
    some = tasks()
    wanted = [task() for task in some]
    bad = make_batch()
    bad.completion_ids[0, 0] = 10**6

    def failing() -> int:
        for route in ROUTES:
            with pytest.raises(ValueError, match="expected ids in"):
                run(route, bad)
        return len(ROUTES)

    def working() -> list:
        return [task() for task in some]

    failures, *others = at_once([failing, *[working] * 3])
    assert failures == len(ROUTES)
    for results in others:
        for result, expected in zip(results, wanted, strict=True):
            assert_equal(result, expected)


def test_eight_threads_share_a_head_that_has_hooks():
    """There a call takes the place of the layer's forward for a while."""
    lm, interval = FusedLM(tiny("qwen2")), sys.getswitchinterval()
    lm.lm_head.register_forward_hook(lambda module, given, out: None)

    def score(i: int) -> torch.Tensor:
        ids = torch.randint(3, VOCAB, (1, 5 + i), generator=torch.Generator().manual_seed(i))
        return lm(ids, None, torch.arange(5 + i)[None] > 0).logps.detach()

    wanted = [score(i) for i in range(THREADS)]
    sys.setswitchinterval(1e-5)  # seconds: threads take turns within a call
    try:
        results = at_once([lambda i=i: [score(i) for _ in range(20)] for i in range(THREADS)])
    finally:
        sys.setswitchinterval(interval)
    for scores, expected in zip(results, wanted, strict=True):
        assert not isinstance(scores, Exception), scores
        assert all(torch.equal(x, expected) for x in scores)
