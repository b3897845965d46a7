"""Rows of the fault matrix that need a GPU. Without one they are skipped by name."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import fastgrpo
from fastgrpo import checks
from fastgrpo.dispatch import choice
from fastgrpo.testing import Batch, make_batch, relative_error
from fastgrpo_kernels.runtime import LAUNCHES
from loss_routes import Outcome, assert_same, exact, routes, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
SMALL = dict(sequences=3, length=4, hidden_size=16)
RAGGED = dict(sequences=5, length=37, hidden_size=200, vocab=5003)


def moved(batch: Batch, device: str = "cuda") -> Batch:
    return Batch(*(x.to(device) for x in batch))


def on_cpu(out: Outcome) -> Outcome:
    return Outcome(*(x.cpu() for x in out))


@routes()
def test_row_06_07_nobody_looks_at_an_id_outside_the_vocabulary(route):
    """NaN at these tokens alone; within `checked` an error that names the argument."""
    batch = make_batch(**SMALL)
    batch.completion_mask[:2] = True
    clean = run(route, moved(batch))
    others = torch.ones_like(batch.completion_mask)
    for b, t, foreign in ((0, 0, 53), (0, 1, 64), (1, 0, -1), (1, 1, 10**12)):
        batch.completion_ids[b, t], others[b, t] = foreign, False
    out = run(route, moved(batch))
    assert out.value.isnan() and torch.equal(out.logps.isnan().cpu(), ~others)
    others = others.cuda()
    torch.testing.assert_close(out.logps[others], clean.logps[others])
    assert not out.dhidden.isfinite().all() and not out.dweight.isfinite().all()
    with checks.checked(), pytest.raises(ValueError, match="_ids: expected ids in"):
        run(route, moved(batch))


@pytest.mark.parametrize("rows, vocab, hidden_size", [
    (2**17 + 3, 512, 2**14), (64, 2**17 + 3, 2**14),
], ids=["hidden states", "a weight"])  # fmt: skip
def test_row_08_more_numbers_than_an_int32_counts(rows, vocab, hidden_size):
    """The last rows of either, which 32-bit addresses would take from the beginning."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        x = torch.empty(*size, device="cuda", dtype=torch.bfloat16)
        return x.normal_(generator=g)

    hidden, weight = normal(rows, hidden_size), normal(vocab, hidden_size).mul_(2**-7)
    assert max(hidden.numel(), weight.numel()) > 2**31
    ids = torch.randint(vocab, (rows,), device="cuda", generator=g)
    ids[-8:] = vocab - 1
    mask = torch.zeros(rows, dtype=torch.bool, device="cuda")
    mask[-8:] = True
    every = fastgrpo.linear_logps(hidden, weight, ids).logps
    out = fastgrpo.linear_logps(
        hidden.requires_grad_(), weight.requires_grad_(), ids.masked_fill(~mask, -100)
    )
    out.logps.sum().backward()
    h, w = hidden.detach()[-8:].double(), weight.detach()
    z = torch.cat([h @ part.double().T for part in w.split(2**14)], 1)
    p = z.softmax(-1)
    wanted = z.log_softmax(-1)[:, -1]
    for logps in (out.logps[-8:], every[-8:]):
        assert (logps - wanted).abs().max() <= 2e-5
    dz = -p
    dz[:, -1] += 1
    parts = zip(dz.split(2**14, 1), w.split(2**14), strict=True)
    dhidden = sum(d @ part.double() for d, part in parts)
    assert relative_error(hidden.grad[-8:], dhidden) <= 4e-3
    assert relative_error(weight.grad[-8:], dz[:, -8:].T @ h) <= 4e-3


@pytest.mark.parametrize("config", ["grpo", "gspo"])
def test_row_09_more_rows_and_sequences_than_65535(config):
    n = 70_000
    batch = make_batch(sequences=n, length=1, hidden_size=64, vocab=301)
    assert_same(
        on_cpu(run("loss", moved(batch), config=config)), exact("loss", batch, config=config)
    )
    rewards = torch.randn(2 * n, generator=torch.Generator().manual_seed(0))
    actual = fastgrpo.group_advantages(rewards.cuda(), 2).cpu()
    assert (actual - fastgrpo.group_advantages(rewards, 2)).abs().max() <= 1e-5


@pytest.mark.parametrize("cut", [0, 1], ids=["aligned", "odd addresses"])
@routes(without=("sparse",))
def test_row_10_13_14_strides_addresses_and_sizes_that_fill_no_tile(route, cut):
    batch = make_batch(**RAGGED | {"hidden_size": 199 + cut})
    moved_batch = moved(batch)
    if cut:
        # Columns with a stride of 2, and a first element that is not at 16 bytes.
        def lie(x: torch.Tensor) -> torch.Tensor:
            wide = torch.zeros(x.numel() * 2 + 1, dtype=x.dtype, device=x.device)
            view = wide[1:].view(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
            return view.copy_(x)

        moved_batch = Batch(*(lie(x) for x in moved_batch))
    assert_same(on_cpu(run(route, moved_batch)), exact(route, batch))


@pytest.mark.parametrize("vocab, hidden_size", [(50_257, 768), (151_937, 896)])
@routes(of=("loss", "loss of two phases", "log-probs"))
def test_row_14_vocabularies_of_models_that_fill_no_tile(route, vocab, hidden_size):
    batch = make_batch(sequences=2, length=33, vocab=vocab, hidden_size=hidden_size)
    assert_same(on_cpu(run(route, moved(batch))), exact(route, batch))


@routes(of=("loss, several chunks", "loss of two phases", "log-probs, several chunks"))
def test_row_23_sums_over_chunks_are_fp32(route):
    batch, n = make_batch(sequences=1, length=1, hidden_size=64, vocab=301), 2000
    many = Batch(
        *(x if name in ("weight", "advantages") else x.expand(1, n, *x.shape[2:])
          for name, x in batch._asdict().items())
    )  # fmt: skip
    many = many._replace(hidden=many.hidden.bfloat16(), weight=many.weight.bfloat16())
    assert_same(on_cpu(run(route, moved(many))), exact(route, many))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_row_24_fp32_is_not_rounded_to_tf32_unless_pytorch_may(precision):
    batch = make_batch(**RAGGED)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        out = on_cpu(run("loss", moved(batch)))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    wanted = exact("loss", batch)
    if precision == "ieee":
        assert_same(out, wanted)
    else:
        assert (out.logps - wanted.logps).abs().max() <= 2e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@routes()
def test_row_31_tensors_on_another_than_the_current_device(route):
    batch = make_batch(**SMALL)
    torch.cuda.set_device(0)
    out = run(route, moved(batch, "cuda:1"))
    assert all(x.device.index == 1 for x in out) and torch.cuda.current_device() == 0
    assert_same(on_cpu(out), on_cpu(run(route, moved(batch, "cuda:0"))))


@routes()
def test_row_32_the_current_stream(route):
    """All of a call runs there: it ends while the default stream still sleeps."""
    batch = moved(make_batch(**RAGGED))
    wanted, stream, slept = run(route, batch), torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        run(route, batch)  # whatever is allocated waits for no stream later
    torch.cuda.synchronize()
    torch.cuda._sleep(2**31)
    slept.record()
    with torch.cuda.stream(stream):
        out = run(route, batch)
    stream.synchronize()
    assert not slept.query(), "the default stream woke up: sleep longer"
    with torch.cuda.stream(stream):
        same = [torch.equal(x, y) for x, y in zip(out, wanted, strict=True)]
    assert all(same)
    torch.cuda.synchronize()


@routes(of=("loss", "log-probs", "selected log-probs"))
def test_row_33_a_capture_is_refused_and_goes_on(route):
    batch, graph = moved(make_batch(**SMALL)), torch.cuda.CUDAGraph()
    hidden = batch.hidden.clone()
    with torch.cuda.graph(graph):
        twice = hidden * 2
        with pytest.raises(RuntimeError, match="outside of a CUDA graph"):
            run(route, batch._replace(hidden=twice))
    hidden.fill_(3.0)
    graph.replay()
    assert (twice == 6).all()


@routes()
def test_row_39_the_same_bits_a_hundred_times(route):
    batch = moved(make_batch(**RAGGED))
    first = run(route, batch)
    for _ in range(99):
        assert all(torch.equal(x, y) for x, y in zip(first, run(route, batch), strict=True))


IN_A_PROCESS = """
import hashlib, sys
sys.path[:0] = {paths!r}
from fastgrpo.testing import Batch, make_batch
from loss_routes import ROUTES, run
digest = hashlib.sha256()
for route in ROUTES:
    for x in run(route, Batch(*(x.cuda() for x in make_batch(**{shape!r})))):
        digest.update(x.cpu().numpy().tobytes())
print(digest.hexdigest())
"""


def test_row_39_the_same_bits_after_a_restart():
    script, digests = IN_A_PROCESS.format(paths=sys.path, shape=RAGGED), set()
    for seed in ("0", "1"):
        child = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        digests.add(child.stdout)
    assert len(digests) == 1


@pytest.fixture
def too_large(monkeypatch):
    """Launch entries of log-probs whose tiles in flight fit nowhere, and no verdict yet."""
    monkeypatch.setenv("FASTGRPO_BACKEND", "auto")
    monkeypatch.setattr(choice, "_verdicts", {})
    for kernel in ("linear_logps", "linear_logps_ragged_h", "anchored_logps"):
        for key, entry in LAUNCHES[kernel].items():
            deep = dataclasses.replace(entry, num_stages=20)
            monkeypatch.setitem(LAUNCHES[kernel], key, deep)


def test_row_43_kernels_that_do_not_fit(too_large):
    """One warning for each route that is given up, then torch, with the same numbers."""
    batch = make_batch(**RAGGED, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="cannot be launched"):
        out = run("log-probs", moved(batch))
    assert_same(on_cpu(out), exact("log-probs", batch))
    # Warnings are errors here: the second call says nothing.
    again = run("log-probs", moved(batch))
    assert all(torch.equal(x, y) for x, y in zip(out, again, strict=True))
