"""`grpo_loss` against the reference in float64: every preset, every route, and the properties."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig, reference
from fastgrpo.head import routes
from fastgrpo.head.loops import logps_fwd
from fastgrpo.objective.presets import PRESETS as ALL_PRESETS
from fastgrpo.testing import make_batch, relative_error, rms
from fastgrpo_kernels.runtime import INTERPRETED
from oracle import PRESETS, config_of, exact, fused

ROUTES = {
    # One chunk holds all rows: gradients in one pass.
    "one pass": {},
    # One row per chunk: dweight is summed over chunks.
    "row by row": {"workspace_mb": 53 * 4 * 1.01 / 2**20},
    # As many rows as leave a ragged last chunk.
    "ragged chunks": {"workspace_mb": 53 * 4 * 5.5 / 2**20},
}
# The interpreter takes a tenth of a second for a chunk.
SLOW = {"row by row": pytest.mark.slow} if INTERPRETED else {}
OPTIONS = {
    "plain": {},
    "kl": {"beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.3},
    "kl and entropy": {"beta": 0.1, "entropy_coef": 0.3, "entropy": "detached"},
    "differentiable entropy": {"entropy_coef": 0.3, "entropy": "differentiable", "beta": 0.05},
}


def assert_close(batch, config, bar=1e-5, loss_bar=1e-6, on_policy=False, head=None, **options):
    head = head or {}
    loss, dhidden, dweight = exact(batch, config, on_policy=on_policy, **head)
    out, *grads = fused(batch, config, on_policy=on_policy, **head, **options)
    assert out.loss.item() == pytest.approx(loss.item(), rel=loss_bar * 10, abs=loss_bar)
    for actual, wanted in zip(grads, (dhidden, dweight), strict=True):
        assert actual is None or relative_error(actual, wanted) <= bar
    return out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_equals_the_reference(backend, preset, options):
    assert_close(make_batch(), config_of(preset, **options), backend=backend)


@pytest.mark.parametrize("preset", PRESETS)
def test_on_policy_and_per_token_advantages(backend, preset):
    batch = make_batch()
    per_token = torch.randn(batch.completion_ids.shape, generator=torch.Generator().manual_seed(1))
    config = config_of(preset)
    assert_close(batch, config, on_policy=True, backend=backend)
    assert_close(batch._replace(advantages=per_token), config, backend=backend)


@pytest.mark.parametrize("vocab, hidden_size", [(1, 24), (53, 1), (1, 1)])
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_one_entry_and_one_column(backend, preset, vocab, hidden_size):
    batch = make_batch(vocab=vocab, hidden_size=hidden_size)
    assert_close(batch, config_of(preset, beta=0.1, entropy_coef=0.1), backend=backend)


@pytest.mark.parametrize("off_policy", [1e-4, 3e-4, 0.2, 0.3, 3.0, 60.0])
@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "cispo"])
def test_around_the_clip_edges_and_far_beyond(backend, preset, off_policy):
    """60 nats: ratios of e^60 and e^-60."""
    assert_close(make_batch(off_policy=off_policy, sequences=8), config_of(preset), backend=backend)


def test_two_sided_clip(backend):
    config = LossConfig.preset("grpo", delta=1.3)
    plain = exact(make_batch(off_policy=1.0), LossConfig())[1]
    batch = make_batch(off_policy=1.0)
    assert_close(batch, config, backend=backend)
    assert relative_error(fused(batch, config)[1], plain) > 1e-2


@pytest.mark.parametrize(
    "route", [pytest.param(x, id=name, marks=SLOW.get(name, ())) for name, x in ROUTES.items()]
)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_every_route_gives_the_same(backend, dtype, preset, frozen, route):
    bar = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    batch = make_batch(dtype=dtype)
    config = LossConfig.preset(preset, beta=0.1)
    assert_close(batch, config, bar, frozen=frozen, backend=backend, **route)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_the_head_transforms_reach_every_route(backend, entropy_coef):
    batch = make_batch()
    g = torch.Generator().manual_seed(1)
    head = {
        "bias": torch.randn(batch.weight.shape[0], generator=g),
        "temperature": torch.rand(batch.completion_ids.shape, generator=g) + 0.5,
        "logit_scale": 0.7,
        "softcap": 5.0,
    }
    for preset in ("grpo", "gspo"):
        for frozen in (False, True):
            config = LossConfig.preset(preset, beta=0.1, entropy_coef=entropy_coef)
            assert_close(batch, config, head=head, frozen=frozen, backend=backend)


def test_a_temperature_may_be_a_scalar_tensor(backend):
    batch = make_batch()
    for entropy in ("none", "differentiable"):
        config = LossConfig(entropy=entropy)
        a, b = (fused(batch, config, temperature=t, backend=backend)[0].loss
                for t in (0.75, torch.tensor(0.75)))  # fmt: skip
        assert a == b


def test_bias_gradient(backend):
    batch = make_batch()
    bias = torch.randn(batch.weight.shape[0], dtype=torch.float64, requires_grad=True)
    logps, _, _ = reference.token_logps(
        batch.hidden.double(), batch.weight.double(), batch.completion_ids, bias=bias
    )
    loss = reference.policy_loss(
        logps, None, batch.completion_mask, batch.advantages.double(), LossConfig()
    )
    (wanted,) = torch.autograd.grad(loss, bias)
    ours = bias.detach().float().requires_grad_()
    out = fastgrpo.grpo_loss(*batch[:4], batch.advantages, bias=ours, backend=backend)
    out.loss.backward()
    assert relative_error(ours.grad, wanted) <= 1e-5


def test_results_besides_the_loss(backend):
    batch = make_batch(off_policy=0.5)
    config = LossConfig.preset("grpo", entropy="detached")
    out, _, _ = fused(batch, config, backend=backend, sampler_logps=batch.old_logps)
    logps, entropy, _ = reference.token_logps(
        batch.hidden.double(), batch.weight.double(), batch.completion_ids
    )
    m = batch.completion_mask
    assert rms(out.logps[m], logps[m]) <= 1e-5 and rms(out.entropy[m], entropy[m]) <= 1e-5
    assert out.logps[~m].eq(0).all() and out.entropy[~m].eq(0).all()
    assert not out.logps.requires_grad and not out.entropy.requires_grad
    log_ratio = (logps - batch.old_logps)[m]
    ratio = log_ratio.exp()
    to_reference = (batch.ref_logps - logps)[m]
    advantages = batch.advantages[:, None].expand_as(m)[m]
    low = (ratio < 0.8) & (advantages < 0)
    high = (ratio > 1.2) & (advantages > 0)
    assert low.any() and high.any()
    wanted = {
        "kl": (to_reference.exp() - to_reference - 1).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clip_low": low.double().mean(),
        "clip_high": high.double().mean(),
        "clip_region": (low | high).double().mean(),
        "importance_mean": ratio.mean(),
        "importance_square": ratio.square().mean(),
        "ess": ratio.mean() ** 2 / ratio.square().mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "sampler_kl": (ratio - 1 - log_ratio).mean(),
        "live_rows": (~(low | high)).double().mean(),
        "entropy": entropy[m].mean(),
    }
    for name, value in wanted.items():
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-4), name
        assert out.metrics[f"{name}_count"] == m.sum()
    assert set(out.metrics) == {*wanted, *(f"{name}_count" for name in wanted)}


def test_packed_equals_padded(backend):
    batch = make_batch()
    m = batch.completion_mask.clone()
    m[0, 2] = False  # a tool's token: masked, not removed
    lengths = batch.completion_mask.sum(1)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    for preset in ("grpo", "dapo", "gspo"):
        config = LossConfig.preset(preset, beta=0.1)
        padded, dhidden, dweight = fused(batch._replace(completion_mask=m), config, backend=backend)
        keep = batch.completion_mask
        hidden, weight = batch.hidden[keep].requires_grad_(), batch.weight.requires_grad_()
        packed = fastgrpo.grpo_loss(
            hidden,
            weight,
            batch.completion_ids[keep],
            m[keep],
            batch.advantages,
            old_logps=batch.old_logps[keep],
            ref_logps=batch.ref_logps[keep],
            cu_seqlens=cu,
            config=config,
            backend=backend,
        )
        grads = torch.autograd.grad(packed.loss, (hidden, weight))
        assert packed.loss.item() == pytest.approx(padded.loss.item(), rel=1e-5)
        assert torch.allclose(grads[0], dhidden[keep], atol=1e-6)
        assert torch.allclose(grads[1], dweight, atol=1e-6)
        assert torch.allclose(packed.logps, padded.logps[keep], atol=1e-6)


def test_masked_positions_may_hold_anything(backend):
    batch = make_batch()
    for preset in ("grpo", "gspo"):
        config = LossConfig.preset(preset, beta=0.1, entropy_coef=0.1)
        clean, *grads = fused(batch, config, backend=backend)
        nan = ~batch.completion_mask
        poisoned = batch._replace(
            hidden=batch.hidden.masked_fill(nan[..., None], torch.nan),
            completion_ids=batch.completion_ids.masked_fill(nan, 10**9),
            old_logps=batch.old_logps.masked_fill(nan, torch.nan),
            ref_logps=batch.ref_logps.masked_fill(nan, torch.inf),
            advantages=batch.advantages[:, None].expand_as(nan).masked_fill(nan, torch.nan),
        )
        temperature = torch.ones(nan.shape).masked_fill(nan, -1.0)
        dirty, *dirty_grads = fused(poisoned, config, temperature=temperature, backend=backend)
        assert dirty.loss == clean.loss and torch.equal(dirty.logps, clean.logps)
        assert all(torch.equal(a, b) for a, b in zip(grads, dirty_grads, strict=True))
        assert dirty_grads[0][nan].eq(0).all()


EMPTY = {
    "no tokens": dict(sequences=2, length=0),
    "no sequences": dict(sequences=0, length=4),
    "all masked": dict(sequences=2, length=3),
}


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_to_learn_from_gives_zero(backend, preset, shape):
    shape, config = (shape["sequences"], shape["length"]), config_of(preset)
    hidden, weight = torch.randn(*shape, 8), torch.randn(11, 8)
    out = fastgrpo.grpo_loss(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.bool),
        torch.ones(shape[0]),
        old_logps=torch.zeros(shape),
        config=config,
        backend=backend,
    )
    out.loss.backward()
    assert out.loss == 0 and hidden.grad.eq(0).all() and weight.grad.eq(0).all()
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_micro_batches_of_any_size_add_up(backend, preset):
    batch = make_batch(sequences=6)
    config = config_of(preset, beta=0.1)
    normalizer = fastgrpo.count_normalizer(batch.completion_mask, config)
    whole, dhidden, dweight = fused(batch, config, backend=backend)
    loss, total = 0.0, torch.zeros_like(dweight)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = type(batch)(batch.hidden[rows], batch.weight, *(x[rows] for x in batch[2:]))
        for given in (normalizer, normalizer.item()):
            out, dh, dw = fused(part, config, normalizer=given, backend=backend)
        loss, total = loss + out.loss, total + dw
        assert torch.allclose(dh, dhidden[rows], atol=1e-6)
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    assert torch.allclose(total, dweight, atol=1e-6)


def test_the_order_of_sequences_does_not_matter(backend):
    batch = make_batch(sequences=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = type(batch)(batch.hidden[order], batch.weight, *(x[order] for x in batch[2:]))
    a, dhidden, dweight = fused(batch, "grpo", backend=backend)
    b, dhidden_b, dweight_b = fused(shuffled, "grpo", backend=backend)
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-5)
    assert torch.allclose(dhidden[order], dhidden_b, atol=1e-6)
    assert torch.allclose(dweight, dweight_b, atol=1e-6)


def test_constant_rewards_give_exactly_no_gradient(backend):
    batch = make_batch()
    advantages = fastgrpo.group_advantages(torch.full((4,), 0.1), 4)
    out, dhidden, dweight = fused(batch._replace(advantages=advantages), "grpo", backend=backend)
    assert out.loss == 0 and dhidden.eq(0).all() and dweight.eq(0).all()
    assert out.metrics["live_rows"] == 0 and out.logps.ne(0).any()


def test_a_positive_advantage_raises_the_log_prob_of_the_sampled_token(backend):
    batch = make_batch()
    for sign in (1.0, -1.0):
        signed = batch._replace(advantages=torch.full((4,), sign))
        out, dhidden, _ = fused(signed, "grpo", on_policy=True, backend=backend)
        moved = fastgrpo.linear_logps(
            batch.hidden - 0.01 * dhidden, batch.weight, batch.completion_ids
        ).logps
        m = batch.completion_mask
        assert ((moved - out.logps)[m] * sign > 0).all()


def test_clipped_and_zero_advantage_rows_get_exactly_zero(backend):
    batch = make_batch(sequences=6, off_policy=1.0)
    batch.advantages[1] = 0.0
    out, dhidden, _ = fused(batch, "grpo", backend=backend)
    ratio = (out.logps - batch.old_logps).exp()
    a = batch.advantages[:, None]
    dead = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8)) | (a == 0)
    dead &= batch.completion_mask
    assert dead.sum() > 5 and dhidden[dead].eq(0).all()
    alive = batch.completion_mask & ~dead
    assert dhidden[alive].ne(0).any(-1).all()


def test_tensors_may_have_any_strides(backend):
    batch = make_batch(sequences=5)._replace(completion_mask=torch.ones(5, 7, dtype=torch.bool))
    flat = [x.flatten(0, 1) if x.dim() == 3 else x.flatten() for x in (batch.hidden, *batch[2:4])]
    per_token = batch.advantages.repeat_interleave(7)
    cu = torch.arange(6, dtype=torch.int32) * 7
    bias = torch.randn(53)

    def spaced(x):
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    def run(form):
        hidden, ids, _ = flat
        out = fastgrpo.grpo_loss(
            hidden, batch.weight, form(ids), None, form(per_token), backend=backend,
            cu_seqlens=form(cu), bias=form(bias), old_logps=form(batch.old_logps.flatten()),
            temperature=form(torch.linspace(0.5, 2, 35)), config="gspo",
        )  # fmt: skip
        return out.loss, out.logps

    for a, b in zip(run(spaced), run(torch.clone), strict=True):
        torch.testing.assert_close(a, b)


INERT = [name for name in ALL_PRESETS if config_of(name).zero_advantage_is_inert]


@pytest.mark.parametrize("preset", INERT)
def test_tokens_with_advantage_0_need_not_be_scored(backend, preset, monkeypatch):
    batch = make_batch(sequences=5)
    batch.advantages[:2] = 0.0
    config = config_of(preset)
    known = {"old_logps": batch.old_logps, "sampler_logps": batch.sampler_logps}
    scored, results = [], []

    def counting(rows, *args):
        scored.append(len(rows.ids))
        return logps_fwd(rows, *args)

    monkeypatch.setattr(routes, "logps_fwd", counting)
    for skip in (False, True):
        hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
        out = fastgrpo.grpo_loss(
            hidden, weight, *batch[2:5], **known, config=config, backend=backend,
            skip_zero_advantage=skip,
        )  # fmt: skip
        out.loss.backward()
        results.append((out, hidden.grad, weight.grad))
    (whole, *grads), (part, *part_grads) = results
    left_out = batch.completion_mask & (batch.advantages == 0)[:, None]
    assert scored == [left_out.sum()], "once, without the option"
    torch.testing.assert_close(part.loss, whole.loss)
    for a, b in zip(part_grads, grads, strict=True):
        torch.testing.assert_close(a, b)
    assert (part.logps[left_out] == 0).all() and (whole.logps[left_out] < 0).all()
    kept = batch.completion_mask & ~left_out
    torch.testing.assert_close(part.logps[kept], whole.logps[kept])
    assert part.metrics["live_rows_count"] == kept.sum()


def test_two_backwards_agree_and_scale_with_the_upstream_gradient(backend):
    batch = make_batch(dtype=torch.float16)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    loss = fastgrpo.grpo_loss(hidden, weight, *batch[2:5], backend=backend).loss
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    # A loss scaler's factor must reach values below fp16's range before they are rounded.
    scaled = torch.autograd.grad(loss * 2**16, (hidden, weight), retain_graph=True)
    tiny = torch.autograd.grad(loss * 2**-10, (hidden, weight))
    for a, b, c, d in zip(once, again, scaled, tiny, strict=True):
        assert torch.equal(a, b)
        assert relative_error(c.double() / 2**16, a) <= 1e-3
        assert relative_error(d.double() * 2**10, a) <= 0.1 and d.dtype == torch.float16


def test_a_gradient_that_only_survives_scaled(backend):
    batch = make_batch(dtype=torch.float16)
    hidden, weight = batch.hidden, batch.weight.requires_grad_()
    loss = fastgrpo.grpo_loss(
        hidden, weight, *batch[2:5], normalizer=1e7, config="dapo", backend=backend
    ).loss
    (plain,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 2**16, weight)
    _, _, wanted = exact(batch, LossConfig.preset("dapo"), on_policy=True, normalizer=1e7)
    assert relative_error(plain, wanted) > 0.1
    assert relative_error(scaled.double() / 2**16, wanted) <= 1e-3


def test_second_derivatives_are_refused(backend):
    batch = make_batch()
    hidden = batch.hidden.requires_grad_()
    for loss in (
        fastgrpo.grpo_loss(hidden, *batch[1:5], backend=backend).loss,
        fastgrpo.linear_logps(hidden, *batch[1:3], backend=backend).logps.sum(),
    ):
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_scoring_without_gradient_gives_the_same_loss(backend):
    batch = make_batch()
    out, _, _ = fused(batch, "grpo", backend=backend)
    with torch.no_grad():
        scored = fastgrpo.grpo_loss(*batch[:5], old_logps=batch.old_logps, backend=backend)
    assert scored.loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    assert not scored.loss.requires_grad


def test_the_module_holds_configuration_and_options(backend):
    batch = make_batch()
    module = fastgrpo.FusedGRPOLoss("dapo", temperature=0.7, backend=backend)
    wanted = fastgrpo.grpo_loss(*batch[:5], config="dapo", temperature=0.7, backend=backend)
    assert torch.equal(module(*batch[:5]).loss, wanted.loss) and "epsilon_high=0.28" in repr(module)


def test_differentiable_entropy_can_be_used_outside(backend):
    batch = make_batch()
    hidden = batch.hidden.requires_grad_()
    config = LossConfig.preset("grpo", entropy="differentiable")
    out = fastgrpo.grpo_loss(hidden, *batch[1:5], config=config, backend=backend)
    (ours,) = torch.autograd.grad(out.loss - 0.3 * out.entropy.sum(), hidden)
    exact_hidden = batch.hidden.detach().double().requires_grad_()
    logps, entropy, _ = reference.token_logps(
        exact_hidden, batch.weight.double(), batch.completion_ids
    )
    m = batch.completion_mask
    loss = reference.policy_loss(logps, None, m, batch.advantages.double(), LossConfig())
    (wanted,) = torch.autograd.grad(loss - 0.3 * entropy[m].sum(), exact_hidden)
    assert relative_error(ours, wanted) <= 1e-5
