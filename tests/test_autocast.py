"""Autocast: 16-bit operands on CUDA, nothing on a CPU, fp32 logits and losses on both."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import FusedLM, autocast
from fastgrpo.testing import make_batch
from model_families import VOCAB, tiny
from oracle import operands

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("device, enabled, asked, given, wanted", [
    ("cuda", True, BF16, FP32, BF16),
    ("cuda", True, FP16, FP32, FP16),
    ("cuda", True, FP16, BF16, FP16),
    ("cuda", True, BF16, FP64, FP64),
    ("cuda", False, BF16, FP32, FP32),
    ("cpu", True, BF16, FP32, FP32),
    ("xpu", True, BF16, FP32, FP32),
])  # fmt: skip
def test_the_dtype_of_an_operand(device, enabled, asked, given, wanted):
    assert autocast.operand_dtype(device, enabled, asked, given) == wanted


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Operands are cast as if they were on CUDA, under autocast to bfloat16."""
    decide = autocast.operand_dtype

    def decided(device_type, enabled, autocast_dtype, dtype):
        return decide("cuda", True, BF16, dtype)

    monkeypatch.setattr(autocast, "operand_dtype", decided)


def results(function, hidden, weight):
    """The first result of a function, and its gradients with respect to both operands."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    out = function(hidden, weight)[0]
    return out, *torch.autograd.grad(out.sum(), (hidden, weight))


def functions(backend):
    batch = make_batch()
    yield lambda hidden, weight: fastgrpo.linear_logps(
        hidden, weight, batch.completion_ids.clamp(min=0), backend=backend
    )
    yield lambda hidden, weight: fastgrpo.grpo_loss(
        hidden, weight, *batch[2:5], old_logps=batch.old_logps, backend=backend
    )


def test_products_are_of_16_bits_and_the_rest_fp32(as_on_cuda, backend):
    batch = make_batch()
    for function in functions(backend):
        out, *grads = results(function, batch.hidden, batch.weight)
        wanted, *rounded = results(function, batch.hidden.bfloat16(), batch.weight.bfloat16())
        assert out.dtype == FP32 and torch.equal(out, wanted)
        for actual, half in zip(grads, rounded, strict=True):
            assert actual.dtype == FP32 and half.dtype == BF16
            assert torch.equal(actual, half.float())


def test_an_fp32_state_may_meet_a_16_bit_weight_there(as_on_cuda):
    hidden, weight, ids, _ = operands()
    mixed = fastgrpo.linear_logps(hidden, weight.bfloat16(), ids).logps
    assert torch.equal(mixed, fastgrpo.linear_logps(hidden, weight, ids).logps)


def test_an_adapter_stays_as_it_is_there(as_on_cuda, backend):
    """It meets operands of 16 bits, and is not rounded itself."""
    hidden, weight, ids, _ = operands()
    a, b = torch.randn(2, hidden.shape[-1]), torch.randn(len(weight), 2)
    lora = (a.requires_grad_(), b.requires_grad_())
    found = []
    for dtype in (FP32, BF16):
        out = fastgrpo.linear_logps(
            hidden.to(dtype), weight.to(dtype), ids, lora=lora, backend=backend
        )
        found.append((out.logps, *torch.autograd.grad(out.logps.sum(), lora)))
    for actual, wanted in zip(*found, strict=True):
        assert actual.dtype == FP32 and torch.equal(actual, wanted)


def test_on_a_cpu_it_changes_nothing(backend):
    batch = make_batch()
    for function in functions(backend):
        wanted = results(function, batch.hidden, batch.weight)
        with torch.autocast("cpu", dtype=BF16):
            actual = results(function, batch.hidden, batch.weight)
        assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


def test_a_model_is_compared_in_its_own_dtype():
    """Rounded by autocast, its log-probs would be further off than fp32 may be."""
    ids = torch.arange(3, 19).view(2, 8) % VOCAB
    scored = torch.arange(8).expand(2, 8) > 2
    with torch.autocast("cpu", dtype=BF16):
        lm = FusedLM(tiny("qwen2"))
        rounded = lm(ids, None, scored).logps
    assert (rounded - lm(ids, None, scored).logps).abs().max() > 1e-3
