"""No tensor of rows x vocabulary: checked in every operation, and by the peak of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig, ops, reference
from fastgrpo.testing import make_batch
from fastgrpo_kernels import Logps
from oracle import largest_inside, live_inside

ROWS, HIDDEN, VOCAB, WORKSPACE_MB = 512, 16, 4096, 0.25
LOGITS = ROWS * VOCAB * 4
assert LOGITS == 32 * WORKSPACE_MB * 2**20


def make(dtype=torch.float32):
    return make_batch(
        sequences=8, length=ROWS // 8, hidden_size=HIDDEN, vocab=VOCAB, dtype=dtype, logit_std=2.0
    )._replace(completion_mask=torch.ones(8, ROWS // 8, dtype=torch.bool))


def loss_call(batch, frozen=False, **options):
    hidden = batch.hidden.requires_grad_()
    weight = batch.weight.requires_grad_(not frozen)
    return lambda: fastgrpo.grpo_loss(
        hidden, weight, *batch[2:5], old_logps=batch.old_logps, workspace_mb=WORKSPACE_MB, **options
    )


BUDGET = int(WORKSPACE_MB * 2**20)
CONFIGS = {
    "grpo": "grpo",
    "gspo": "gspo",
    "entropy": LossConfig.preset("grpo", entropy_coef=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_largest_tensor_stays_within_the_workspace(monkeypatch, config, frozen, dtype):
    call = loss_call(make(dtype), frozen, config=config, backend="torch")
    dweight = VOCAB * HIDDEN * dtype.itemsize
    assert largest_inside(ops.grpo_loss, call, monkeypatch) <= max(BUDGET, dweight)


def test_log_probs_and_their_backward(monkeypatch):
    batch = make()
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()

    def call():
        fastgrpo.linear_logps(
            hidden, weight, batch.completion_ids, workspace_mb=WORKSPACE_MB, backend="torch"
        ).logps.sum().backward()

    for op in (ops.linear_logps, ops.linear_logps_bwd):
        assert largest_inside(op, call, monkeypatch) <= BUDGET


def test_full_logits_would_be_caught(monkeypatch):
    """The same observer on the same op, with the loop replaced by the reference."""
    batch = make()

    def full_logits(rows, head, plan, with_entropy):
        logps, _, lse = reference.token_logps(rows.hidden, head.weight, rows.ids)
        return Logps(logps, lse, None)

    monkeypatch.setattr(ops.logps, "logps_fwd", full_logits)
    call = lambda: fastgrpo.linear_logps(*batch[:3], backend="torch")  # noqa: E731
    assert largest_inside(ops.linear_logps, call, monkeypatch) >= LOGITS


def test_results_do_not_depend_on_the_workspace():
    batch = make()
    results = []
    for workspace_mb in (0.02, 0.25, 5.0, 64.0):
        hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
        out = fastgrpo.grpo_loss(hidden, weight, *batch[2:5], workspace_mb=workspace_mb)
        out.loss.backward()
        results.append((out.loss, out.logps, hidden.grad, weight.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


LIVE = {
    "plain": {},
    "a tenth clipped": {"clipped": 0.1},
    "entropy reported": {"config": LossConfig.preset("dapo", entropy="detached")},
    "entropy": {"config": LossConfig.preset("dapo", entropy_coef=0.01)},
    "softcap": {"softcap": 30.0},
    "entropy and softcap": {
        "config": LossConfig.preset("dapo", entropy_coef=0.01), "softcap": 30.0,
    },
    "bias and a temperature for each token": {"transformed": True},
    "two phases": {"config": LossConfig.preset("gspo")},
}  # fmt: skip


@pytest.mark.parametrize("vocab, rows, hidden_size", [(1000, 4096, 128), (50_257, 300, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", LIVE.values(), ids=LIVE)
def test_all_that_lives_at_once_is_one_workspace(
    monkeypatch, options, dtype, vocab, rows, hidden_size
):
    """Beside it O(rows * H), and in 16 bits an fp32 sum of dweight where it saves a pass."""
    batch = make_batch(
        sequences=4, length=rows // 4, hidden_size=hidden_size, vocab=vocab, dtype=dtype
    )
    options = {"config": "dapo", **options}
    old = fastgrpo.linear_logps(*batch[:3], softcap=options.get("softcap")).logps
    late = torch.rand(old.shape, generator=torch.Generator().manual_seed(0))
    moved = (late < options.pop("clipped", 0.0)) * batch.advantages.sign()[:, None]
    hidden, weight = (x.requires_grad_() for x in batch[:2])
    if options.pop("transformed", False):
        options |= {"bias": torch.zeros(vocab, dtype=dtype), "temperature": old.abs() + 0.5}
    workspace = fastgrpo.default_workspace_mb(vocab, "cpu") * 2**20

    def call():
        fastgrpo.grpo_loss(hidden, weight, *batch[2:5], old_logps=old - moved, **options)

    sums = 4 * vocab * hidden_size if dtype == torch.bfloat16 else 0
    per_row = rows * (6 * 4 * hidden_size + 200)
    assert live_inside(ops.grpo_loss, call, monkeypatch) <= 1.1 * workspace + per_row + sums


PEAK = """
import ctypes, sys, torch
import fastgrpo
from pathlib import Path

def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if key in l)
    return int(line.split()[1]) / 1024

def run(rows, vocab, hidden_size, config, dtype):
    hidden = torch.randn(8, rows // 8, hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, dtype=dtype).div_(hidden_size**0.5).requires_grad_()
    ids = torch.randint(vocab, (8, rows // 8))
    ones = torch.ones(8, rows // 8, dtype=torch.bool)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    fastgrpo.grpo_loss(hidden, weight, ids, ones, torch.randn(8), config=config).loss.backward()
    return status("VmHWM") - before

dtype = getattr(torch, sys.argv[2])
run(64, 512, 64, sys.argv[1], dtype)
print(run(1024, 32000, 256, sys.argv[1], dtype))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", ["grpo", "gspo"])
def test_the_peak_of_a_process(config, dtype):
    """Gradients, workspace, O(N H): no logits (125 MiB), no second dweight.

    In 16 bits one pass over several chunks sums dweight in fp32; two phases need no such copy.
    """
    rows, vocab, hidden_size = 1024, 32000, 256
    size = getattr(torch, dtype).itemsize if config == "gspo" else 4
    gradients = (vocab + rows) * hidden_size * size / 2**20
    workspace = fastgrpo.default_workspace_mb(vocab, "cpu")
    per_row = rows * hidden_size * 4 * 3 / 2**20
    peak = float(
        subprocess.run(
            [sys.executable, "-c", PEAK, config, dtype],
            capture_output=True,
            text=True,
            check=True,
            env={
                "PYTHONPATH": ":".join(sys.path),
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "MALLOC_TRIM_THRESHOLD_": "0",
                "OMP_NUM_THREADS": "1",
            },
        ).stdout
    )
    slack = 8  # MiB: libraries' own buffers and code pages touched for the first time
    assert peak <= gradients + workspace + per_row + slack
