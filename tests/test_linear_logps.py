"""`linear_logps` against full logits in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import reference
from fastgrpo.testing import relative_error, rms
from oracle import DTYPES, GRADIENT_BARS, TRANSFORMS, operands
from oracle import exact_logps as exact


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_values_and_gradients_equal_full_logits_in_float64(backend, dtype, transform):
    hidden, weight, ids, options = operands(dtype, transform)
    g = torch.Generator().manual_seed(2)
    upstream, upstream_entropy = torch.randn((2, *ids.shape), generator=g)
    logps, entropy, lse, grads = exact(hidden, weight, ids, options, upstream, upstream_entropy)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    if "bias" in options:
        leaves.append(options["bias"].requires_grad_())
    out = fastgrpo.linear_logps(
        hidden, weight, ids, entropy="differentiable", backend=backend, **options
    )
    torch.autograd.backward([out.logps, out.entropy], [upstream, upstream_entropy])
    for actual, wanted in zip(out, (logps, entropy, lse), strict=True):
        assert actual.dtype == torch.float32 and actual.shape == ids.shape
        assert (actual - wanted).abs().max() <= 2e-5
    assert rms(out.logps, logps) <= 1e-5
    for leaf, wanted in zip(leaves, grads.values(), strict=True):
        assert leaf.grad.dtype == dtype
        assert relative_error(leaf.grad, wanted) <= GRADIENT_BARS[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_as_good_as_plain_torch_with_fp32_logits(backend, dtype):
    """Nothing is lost beyond the rounding of the results themselves."""
    hidden, weight, ids, _ = operands(dtype, sequences=8, length=16, hidden_size=40, vocab=307)
    upstream = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2))
    _, _, _, grads = exact(hidden, weight, ids, {}, upstream)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    plain, _, _ = reference.token_logps(hidden.float(), weight.float(), ids)
    baseline = torch.autograd.grad((plain * upstream).sum(), leaves)
    ours = fastgrpo.linear_logps(hidden, weight, ids, backend=backend).logps
    actual = torch.autograd.grad((ours * upstream).sum(), leaves)
    for name, a, b in zip(("hidden", "weight"), actual, baseline, strict=True):
        assert relative_error(a, grads[name]) <= 1.25 * relative_error(b, grads[name])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_frozen_head_has_the_same_gradient_and_no_gemm_in_its_backward(backend, transform):
    hidden, weight, ids, options = operands(transform=transform)
    upstream = torch.randn(ids.shape)
    _, _, _, grads = exact(hidden, weight, ids, options, upstream)
    hidden.requires_grad_()
    logps = fastgrpo.linear_logps(hidden, weight, ids, backend=backend, **options).logps
    weight.fill_(torch.nan)
    logps.backward(upstream)
    assert relative_error(hidden.grad, grads["hidden"]) <= 1e-5


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_only_the_gradients_asked_for_are_made(backend, needs):
    hidden, weight, ids, _ = operands()
    _, _, _, grads = exact(hidden, weight, ids, {}, torch.ones(ids.shape))
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    fastgrpo.linear_logps(hidden, weight, ids, backend=backend).logps.sum().backward()
    for leaf, need, wanted in zip((hidden, weight), needs, grads.values(), strict=True):
        assert (leaf.grad is not None) == need
        assert not need or relative_error(leaf.grad, wanted) <= 1e-5


def test_ignored_rows_are_zero_and_may_hold_anything(backend):
    hidden, weight, ids, _ = operands()
    wanted = fastgrpo.linear_logps(hidden, weight, ids, entropy="detached", backend=backend)
    ignored = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    temperature = torch.where(ignored, torch.nan, 1.0)
    poisoned = torch.where(ignored[..., None], torch.nan, hidden).requires_grad_()
    weight.requires_grad_()
    out = fastgrpo.linear_logps(
        poisoned,
        weight,
        ids.masked_fill(ignored, -100),
        temperature=temperature,
        entropy="detached",
        backend=backend,
    )
    out.logps.backward(torch.where(ignored, torch.nan, 1.0))
    for actual, full in zip(out, wanted, strict=True):
        assert torch.equal(actual[ignored], torch.zeros(int(ignored.sum())))
        assert torch.allclose(actual[~ignored], full[~ignored], atol=1e-6)
    assert poisoned.grad[ignored].eq(0).all() and poisoned.grad[~ignored].ne(0).any()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (3, 0, 8)], ids=str)
def test_no_rows_and_one_row(backend, shape):
    hidden = torch.randn(shape, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    out = fastgrpo.linear_logps(
        hidden, weight, torch.zeros(shape[:-1], dtype=torch.int64), backend=backend
    )
    out.logps.sum().backward()
    assert out.logps.shape == shape[:-1] and weight.grad.isfinite().all()
    assert hidden.numel() or weight.grad.eq(0).all()


@pytest.mark.parametrize("vocab, hidden_size", [(1, 24), (53, 1), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_one_entry_and_one_column(backend, dtype, vocab, hidden_size):
    hidden, weight, ids, _ = operands(dtype, vocab=vocab, hidden_size=hidden_size)
    g = torch.Generator().manual_seed(0)
    upstream, upstream_entropy = torch.randn((2, *ids.shape), generator=g)
    *scores, grads = exact(hidden, weight, ids, {}, upstream, upstream_entropy)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = fastgrpo.linear_logps(*leaves, ids, entropy="differentiable", backend=backend)
    torch.autograd.backward([out.logps, out.entropy], [upstream, upstream_entropy])
    for actual, wanted in zip(out, scores, strict=True):
        assert (actual - wanted).abs().max() <= 2e-5
    # The gradient of a certain token is 0. Its error is as large as that of any other token: it is
    # measured on the gradient of the target's logit alone.
    target = (hidden.double() * weight.double()[ids]).sum(-1)
    sizes = torch.autograd.grad((target * upstream).sum(), leaves)
    for leaf, wanted, size in zip(leaves, grads.values(), sizes, strict=True):
        scale = wanted if wanted.any() else size
        assert (leaf.grad - wanted).norm() <= GRADIENT_BARS[dtype] * scale.double().norm()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_extreme_logits_stay_finite_and_right(backend, offset):
    hidden, weight, ids, _ = operands(logit_std=1.0)
    options = {"bias": torch.full((weight.shape[0],), offset)}
    wanted, _, _, _ = exact(hidden, weight, ids, options, torch.ones(ids.shape))
    out = fastgrpo.linear_logps(hidden, weight, ids, entropy="detached", backend=backend, **options)
    # Half an ulp of 1e4 is 5e-4: that is what an fp32 logit can hold.
    assert (out.logps - wanted).abs().max() <= 2e-3 and out.entropy.isfinite().all()


def test_minus_infinity_masks_vocabulary(backend):
    hidden, weight, ids, _ = operands()
    bias = torch.zeros(weight.shape[0])
    bias[~torch.isin(torch.arange(len(bias)), ids)] = -torch.inf
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = fastgrpo.linear_logps(*leaves, ids, bias=bias, entropy="differentiable", backend=backend)
    kept = bias == 0
    small = torch.cumsum(kept, 0)[ids] - 1
    wanted, entropy, _ = reference.token_logps(hidden.double(), weight.double()[kept], small)
    assert torch.allclose(out.logps.double(), wanted, atol=2e-5)
    assert torch.allclose(out.entropy.double(), entropy, atol=2e-5)
    (out.logps.sum() + out.entropy.sum()).backward()
    assert weight.grad[~kept].eq(0).all() and weight.grad.isfinite().all()


def test_a_certain_token_has_log_prob_zero_and_no_gradient(backend):
    hidden = torch.zeros(1, 4, requires_grad=True)
    bias = torch.tensor([0.0, 60.0, 0.0])
    logps = fastgrpo.linear_logps(
        hidden, torch.randn(3, 4), torch.tensor([1]), bias=bias, backend=backend
    ).logps
    logps.sum().backward()
    assert -1e-25 <= logps.item() <= 0 and hidden.grad.abs().max() < 1e-20


def test_a_hopeless_token_keeps_a_finite_log_prob_and_gradient(backend):
    hidden = torch.zeros(1, 4, requires_grad=True)
    bias = torch.tensor([0.0, -200.0, 0.0])
    logps = fastgrpo.linear_logps(
        hidden, torch.randn(3, 4), torch.tensor([1]), bias=bias, backend=backend
    ).logps
    logps.sum().backward()
    assert logps.item() == pytest.approx(-200.693147, abs=1e-4) and hidden.grad.isfinite().all()


def test_any_strides_give_the_same(backend):
    hidden, weight, ids, _ = operands()
    wanted = fastgrpo.linear_logps(hidden, weight, ids, backend=backend).logps
    strided = torch.stack([hidden, hidden], -1)[..., 0], weight.t().contiguous().t()
    assert torch.allclose(
        fastgrpo.linear_logps(*strided, ids, backend=backend).logps, wanted, atol=1e-5
    )
    # An offset that is not a multiple of 16 bytes.
    shifted = torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view_as(weight)
    assert torch.allclose(
        fastgrpo.linear_logps(hidden, shifted, ids, backend=backend).logps, wanted, atol=1e-5
    )


def test_expanded_upstream_gradients(backend):
    hidden, weight, ids, _ = operands()
    weight.requires_grad_()
    for entropy in ("none", "differentiable"):
        out = fastgrpo.linear_logps(hidden, weight, ids, entropy=entropy, backend=backend)
        (expanded,) = torch.autograd.grad(out.logps.sum(), weight, retain_graph=True)
        (dense,) = torch.autograd.grad(out.logps, weight, torch.ones(ids.shape))
        assert torch.equal(expanded, dense)


def test_mixed_precision_head(backend):
    hidden, weight, ids, _ = operands(torch.bfloat16)
    weight = weight.float()
    _, _, _, grads = exact(hidden, weight, ids, {}, torch.ones(ids.shape))
    hidden.requires_grad_(), weight.requires_grad_()
    fastgrpo.linear_logps(hidden, weight, ids, backend=backend).logps.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert relative_error(weight.grad, grads["weight"]) <= 1e-5


def test_autocast_does_not_round_an_fp32_head(backend):
    hidden, weight, ids, _ = operands()
    wanted = fastgrpo.linear_logps(hidden, weight, ids, backend=backend).logps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fastgrpo.linear_logps(hidden, weight, ids, backend=backend).logps
    assert torch.equal(actual, wanted)


def test_a_row_does_not_depend_on_the_batch_around_it(backend):
    hidden, weight, ids, _ = operands(sequences=8, length=33, vocab=301)
    hidden, ids = hidden.flatten(0, 1), ids.flatten()
    if backend == "triton":
        # The interpreter's dot is numpy's, whose rounding depends on the position: leave it none.
        hidden, weight = hidden.round(), weight.round()
    whole = fastgrpo.linear_logps(hidden, weight, ids, backend=backend).logps
    some = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:50]
    alone = fastgrpo.linear_logps(hidden[some], weight, ids[some], backend=backend).logps
    if backend == "triton":
        assert torch.equal(alone, whole[some])
    assert (alone - whole[some]).abs().max() <= 1e-6 * max(1, whole.abs().max())


def test_gradcheck_in_float64():
    hidden, weight, ids, options = operands(transform="all", sequences=2, length=3, vocab=11)
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    leaves = [x.double().requires_grad_() for x in (hidden, weight, options.pop("bias"))]

    def function(hidden, weight, bias):
        out = fastgrpo.linear_logps(
            hidden, weight, ids, bias=bias, entropy="differentiable", backend="torch", **options
        )
        return out.logps, out.entropy

    assert torch.autograd.gradcheck(function, leaves)
