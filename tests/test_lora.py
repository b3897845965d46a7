"""An adapter on a frozen head: weight + B @ A, whose product is never made."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig, ops
from fastgrpo.testing import relative_error
from oracle import (
    DTYPES,
    GRADIENT_BARS,
    TRANSFORMS,
    config_of,
    exact,
    exact_logps,
    largest_inside,
    operands,
    valid_batch,
)

RANK = 3


def adapter(weight, rank=RANK, dtype=None):
    """A (R, H) and B (V, R), which move a logit by about 1."""
    g = torch.Generator().manual_seed(3)
    vocab, hidden_size = weight.shape
    a, b = torch.randn(rank, hidden_size, generator=g), torch.randn(vocab, rank, generator=g)
    a, b = a / hidden_size**0.5, b / rank**0.5
    return tuple(x.to(dtype or weight.dtype).requires_grad_() for x in (a, b))


def merged(weight, lora):
    a, b = (x.detach().double() for x in lora)
    return weight.detach().double() + b @ a


def through_the_product(dweight, lora):
    """The gradients of A and B from that of weight + B @ A."""
    a, b = (x.detach().double() for x in lora)
    return b.t() @ dweight, dweight @ a.t()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_log_probs_are_those_of_the_merged_weight(backend, dtype, transform):
    hidden, weight, ids, options = operands(dtype, transform)
    lora = adapter(weight)
    g = torch.Generator().manual_seed(2)
    upstream, upstream_entropy = torch.randn((2, *ids.shape), generator=g)
    logps, entropy, lse, grads = exact_logps(
        hidden, merged(weight, lora), ids, options, upstream, upstream_entropy
    )
    hidden.requires_grad_()
    out = fastgrpo.linear_logps(
        hidden, weight, ids, lora=lora, entropy="differentiable", backend=backend, **options
    )
    torch.autograd.backward([out.logps, out.entropy], [upstream, upstream_entropy])
    for actual, wanted in zip(out, (logps, entropy, lse), strict=True):
        assert (actual - wanted).abs().max() <= 2e-5
    wanted = (grads["hidden"], *through_the_product(grads["weight"], lora))
    for leaf, gradient in zip((hidden, *lora), wanted, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert relative_error(leaf.grad, gradient) <= GRADIENT_BARS[dtype]


@pytest.mark.parametrize("workspace_mb", [None, 0.01], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("preset", ["grpo", "gspo", "cispo"])
def test_the_loss_is_that_of_the_merged_weight(backend, preset, workspace_mb):
    batch, config = valid_batch(vocab=211), config_of(preset, beta=0.05)
    lora = adapter(batch.weight)
    loss, dhidden, dweight = exact(batch._replace(weight=merged(batch.weight, lora)), config)
    hidden = batch.hidden.clone().requires_grad_()
    out = fastgrpo.grpo_loss(
        hidden, batch.weight, *batch[2:5], old_logps=batch.old_logps, ref_logps=batch.ref_logps,
        sampler_logps=batch.sampler_logps, config=config, lora=lora, workspace_mb=workspace_mb,
        backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    wanted = (dhidden, *through_the_product(dweight, lora))
    for leaf, gradient in zip((hidden, *lora), wanted, strict=True):
        assert relative_error(leaf.grad, gradient) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_of_32_bits_on_a_head_of_16(backend, dtype):
    """What PEFT has by default."""
    hidden, weight, ids, _ = operands(dtype)
    lora, upstream = adapter(weight, dtype=torch.float32), torch.ones(ids.shape)
    logps, _, _, grads = exact_logps(hidden, merged(weight, lora), ids, {}, upstream)
    out = fastgrpo.linear_logps(hidden, weight, ids, lora=lora, backend=backend)
    out.logps.sum().backward()
    assert (out.logps - logps).abs().max() <= 2e-5
    for leaf, wanted in zip(lora, through_the_product(grads["weight"], lora), strict=True):
        assert leaf.grad.dtype == torch.float32
        assert relative_error(leaf.grad, wanted) <= GRADIENT_BARS[dtype]


def test_an_adapter_of_zeros_changes_nothing_and_learns(backend):
    """As adapters begin: B = 0."""
    batch = valid_batch()
    a, b = adapter(batch.weight)
    with torch.no_grad():
        b.zero_()
    call = dict(old_logps=batch.old_logps, config="dapo", backend=backend)
    plain = fastgrpo.grpo_loss(*batch[:5], **call)
    out = fastgrpo.grpo_loss(*batch[:5], lora=(a, b), **call)
    torch.testing.assert_close(out.logps, plain.logps, rtol=0, atol=1e-6)
    out.loss.backward()
    assert not a.grad.any() and b.grad.norm() > 0


def test_masked_positions_may_hold_anything(backend):
    batch, grads = valid_batch(), []
    lora = adapter(batch.weight)
    for garbage in (0.0, torch.nan):
        batch.hidden[~batch.completion_mask] = garbage
        out = fastgrpo.grpo_loss(*batch[:5], lora=lora, config="dapo", backend=backend)
        grads.append(torch.autograd.grad(out.loss, lora))
    for clean, dirty in zip(*grads, strict=True):
        assert torch.equal(clean, dirty) and clean.norm() > 0


def test_tokens_that_are_not_scored_may_hold_anything(backend):
    """`skip_zero_advantage` leaves them out, though they are not masked."""
    batch, grads = valid_batch(), []
    lora = adapter(batch.weight)
    batch.advantages[1] = 0.0
    for garbage in (0.0, torch.nan):
        batch.hidden[1] = garbage
        out = fastgrpo.grpo_loss(
            *batch[:5], lora=lora, config="dapo", skip_zero_advantage=True, backend=backend
        )
        grads.append(torch.autograd.grad(out.loss, lora))
    for clean, dirty in zip(*grads, strict=True):
        assert torch.equal(clean, dirty) and clean.norm() > 0


@pytest.mark.parametrize("trained", [0, 1], ids="AB")
def test_a_loss_that_is_not_finite_spoils_the_gradient_of_either_factor(backend, trained):
    batch = valid_batch()
    lora = tuple(x.requires_grad_(i == trained) for i, x in enumerate(adapter(batch.weight)))
    old = batch.old_logps.clone()
    old[0, 0] = torch.nan
    batch.advantages[0] = 0.0  # the token has no gradient of its own
    out = fastgrpo.grpo_loss(*batch[:5], old_logps=old, lora=lora, config="dapo", backend=backend)
    out.loss.backward()
    assert out.loss.isnan() and not lora[trained].grad.isfinite().all()


def test_factors_may_have_any_strides(backend):
    batch = valid_batch()
    lora = adapter(batch.weight)
    turned = tuple(x.detach().t().contiguous().t().requires_grad_() for x in lora)
    grads = [
        torch.autograd.grad(
            fastgrpo.grpo_loss(*batch[:5], lora=x, config="dapo", backend=backend).loss, x
        )
        for x in (lora, turned)
    ]
    for actual, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("config", ["grpo", "gspo"])
def test_nothing_as_large_as_the_weight_is_made(monkeypatch, config):
    workspace_mb = 0.25
    batch = valid_batch(sequences=8, length=64, hidden_size=128, vocab=4096)
    hidden, lora = batch.hidden.requires_grad_(), adapter(batch.weight)

    def call():
        fastgrpo.grpo_loss(
            hidden, *batch[1:5], old_logps=batch.old_logps, config=config, lora=lora,
            workspace_mb=workspace_mb, backend="torch",
        ).loss.backward()  # fmt: skip

    budget = max(workspace_mb * 2**20, 8 * 64 * (128 + RANK) * 4)
    assert largest_inside(ops.grpo_loss, call, monkeypatch) <= budget
    assert budget < batch.weight.nbytes / 4


def test_compiled_whole():
    batch = valid_batch()
    lora = adapter(batch.weight)

    def loss(hidden, a, b):
        return fastgrpo.grpo_loss(hidden, *batch[1:5], lora=(a, b), backend="torch").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(batch.hidden, *lora), lora) for f in (loss, compiled)]
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(eager, traced)


WRONG = {
    r"lora: expected a tuple \(A, B\), got Tensor": lambda a, b: dict(lora=a),
    r"lora\[0\]: expected shape \(R, 16\), got \(3, 15\)": lambda a, b: dict(lora=(a[:, :-1], b)),
    r"lora\[1\]: expected shape \(40, 3\), got \(39, 3\)": lambda a, b: dict(lora=(a, b[:-1])),
    r"lora\[0\]: expected dtype float32": lambda a, b: dict(lora=(a.double(), b)),
    "sparsity: expected 0 with lora": lambda a, b: dict(lora=(a, b), sparsity=0.01),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_refused(message):
    batch = valid_batch(hidden_size=16, vocab=40)
    options = WRONG[message](*adapter(batch.weight))
    with pytest.raises(ValueError, match=message):
        fastgrpo.grpo_loss(*batch[:5], **options)
    with pytest.raises(ValueError, match=message):
        fastgrpo.linear_logps(*batch[:3], **options)


def test_a_weight_that_is_trained_too_is_refused():
    batch = valid_batch()
    weight = batch.weight.clone().requires_grad_()
    with pytest.raises(ValueError, match="weight: expected a frozen weight with lora"):
        fastgrpo.linear_logps(batch.hidden, weight, batch.completion_ids, lora=adapter(weight))
    config = LossConfig.preset("grpo")
    with torch.no_grad():
        fastgrpo.grpo_loss(batch.hidden, weight, *batch[2:5], config=config, lora=adapter(weight))
