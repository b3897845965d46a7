"""The loops as a GPU runs them: 16-bit GEMM operands, fp32 results, target entries kept apart.

CPUs cannot multiply 16-bit operands into fp32, so `matmul` is emulated; the rest is the real code.
On the torch backend, and in a process with TRITON_INTERPRET=1 on the kernels.
"""

from __future__ import annotations

import pytest
import torch

import fastgrpo_kernels
from fastgrpo import LossConfig, linear_logps, ops, reference
from fastgrpo.head import gradients, loops
from fastgrpo.head import plan as tiles
from fastgrpo.head.plan import Head, Rows, Upstream
from fastgrpo.testing import make_batch, relative_error, rms
from fastgrpo_kernels.runtime import INTERPRETED
from oracle import exact
from oracle import fused as run
from row_oracle import (
    CHUNKING,
    NEEDS,
    TRANSFORMED,
    check_gradients_from_exponentials,
    rows_with_upstream,
)


@pytest.fixture(autouse=True)
def gpu_route(monkeypatch):
    real_plan, operands = tiles.plan, []

    def plan(hidden, weight, workspace_mb):
        chosen = real_plan(hidden, weight, workspace_mb)
        return chosen._replace(operand=hidden.dtype, slice_width=32, chunk_width=32)

    def matmul(out, a, b, accumulate=False):
        if a.dtype != out.dtype:
            operands.append(a.dtype)
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.add_(product) if accumulate else out.copy_(product)

    monkeypatch.setattr(ops, "plan", plan)
    for module in (loops, gradients):
        monkeypatch.setattr(module, "matmul", matmul)
    # A GPU takes one pass over several chunks as well.
    monkeypatch.setattr(tiles.Plan, "one_pass", lambda *_: True)
    yield
    assert torch.bfloat16 in operands


CHUNKS = {"several chunks": 53 * 6 * 100 / 2**20, "one chunk": None}
FROZEN = {"trainable": False, "frozen": True}
if INTERPRETED:  # at ten milliseconds a row the first of each has to do
    CHUNKS, FROZEN = ({name: x[name] for name in list(x)[:1]} for x in (CHUNKS, FROZEN))


@pytest.mark.parametrize("workspace_mb", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
@pytest.mark.parametrize("logit_std", [1.0, 6.0], ids=["flat", "peaked"])
def test_gradients_lose_nothing_to_16_bit_tiles(backend, logit_std, preset, frozen, workspace_mb):
    batch = make_batch(
        sequences=16, length=32, hidden_size=48, dtype=torch.bfloat16, logit_std=logit_std
    )
    config = LossConfig.preset(preset, beta=0.1, entropy_coef=0.0 if frozen else 0.1)
    loss, dhidden, dweight = exact(batch, config)
    out, *grads = run(batch, config, frozen=frozen, workspace_mb=workspace_mb, backend=backend)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    # Plain torch in fp32 rounds its gradients to bf16 once: 1.25 times that is allowed. Rounding
    # the tile too gives up to sqrt(2) where one entry makes up a row: other batches reach 1.28.
    for actual, wanted in zip(grads, (dhidden, dweight), strict=True):
        rounding = relative_error(wanted.bfloat16(), wanted)
        assert actual is None or relative_error(actual, wanted) <= 1.25 * rounding


def test_log_probs_bias_and_softcap(backend):
    batch = make_batch(sequences=8, length=16, dtype=torch.bfloat16)
    bias = torch.randn(batch.weight.shape[0]).bfloat16()
    leaves = [batch.hidden, batch.weight, bias]
    options = {"logit_scale": 0.7, "softcap": 9.0}
    doubles = [x.double().requires_grad_() for x in leaves]
    logps, _, _ = reference.token_logps(
        *doubles[:2], batch.completion_ids, bias=doubles[2], **options
    )
    upstream = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad((logps * upstream).sum(), doubles)
    leaves = [x.requires_grad_() for x in leaves]
    out = linear_logps(*leaves[:2], batch.completion_ids, bias=bias, backend=backend, **options)
    assert rms(out.logps, logps) <= 1e-5
    for actual, exact_grad in zip(
        torch.autograd.grad((out.logps * upstream).sum(), leaves), wanted, strict=True
    ):
        rounding = relative_error(exact_grad.bfloat16(), exact_grad)
        assert relative_error(actual, exact_grad) <= 1.25 * rounding


# ---- from exponentials -------------------------------------------------------------------------


@pytest.mark.skipif(not INTERPRETED, reason="the kernel makes them")
@pytest.mark.parametrize("rows_at_once, dead", CHUNKING.values(), ids=CHUNKING)
@pytest.mark.parametrize("options", TRANSFORMED.values(), ids=TRANSFORMED)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("logit_std", [1.0, 6.0], ids=["flat", "peaked"])
def test_gradients_from_exponentials(monkeypatch, logit_std, needs, options, rows_at_once, dead):
    monkeypatch.setattr(fastgrpo_kernels, "tile_stats", None)  # of the other way
    given = rows_with_upstream(logit_std, options, dead, sequences=16, length=32, hidden_size=48)
    plan = ops.plan(given.rows.hidden, given.head.weight, None)._replace(exps_rows=rows_at_once)
    check_gradients_from_exponentials(given, plan, needs)


@pytest.mark.skipif(not INTERPRETED, reason="the kernel makes them")
def test_exponentials_are_taken_where_they_suffice(monkeypatch):
    """Not for fp16, whose range they leave, nor for an entropy gradient."""
    taken = []
    monkeypatch.setattr(
        loops, "_anchored_logps_and_grads", lambda *args: taken.append(args) or (None, None)
    )
    batch = make_batch(dtype=torch.bfloat16)
    head = Head(batch.weight, None, 1.0, 0.0)
    rows = Rows(batch.hidden.flatten(0, 1), batch.completion_ids.flatten(), None)

    def run(rows, head, **options):
        plan = ops.plan(rows.hidden, head.weight, None)
        policy = lambda c, scored: Upstream(torch.ones_like(scored.logps), None)  # noqa: E731
        loops.logps_and_grads(
            fastgrpo_kernels, rows, head, plan, False, policy, NEEDS["trainable"], **options
        )
        return len(taken)

    assert run(rows, head) == 0
    assert run(rows, head, entropy_gradient=False) == 1
    half = head._replace(weight=head.weight.half())
    assert run(rows._replace(hidden=rows.hidden.half()), half, entropy_gradient=False) == 1
