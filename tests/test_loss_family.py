"""Every surrogate x ratio level x aggregation, every correction, KL and mask, against float64.

The reference differentiates each paper's formula with autograd through full logits. Both sides
compute in float64, so that a bar of 1e-9 leaves no room for a wrong formula; the rounding of the
kernels is tested in tests/test_grpo_loss.py and tests/kernels.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import fastgrpo
import oracle
from fastgrpo import LossConfig, reference
from fastgrpo.objective.fields import AGGREGATIONS, CORRECTIONS, REJECTIONS
from fastgrpo.objective.presets import PRESETS
from fastgrpo.testing import relative_error
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS, KL_GRADIENTS
from fastgrpo_kernels.surrogates import SURROGATES
from oracle import valid_batch as make_batch

# What a surrogate needs to show its behaviour on 20 tokens.
SETTINGS = {
    "cispo_raw": {"epsilon_high": 1.15},
    "dppo_tv": {"epsilon_low": 0.02, "epsilon_high": 0.03, "delta": 1.1},
    "dppo_kl": {"epsilon_low": 0.001, "epsilon_high": 0.002, "delta": 1.1},
    "prime_dppo": {"epsilon_low": 0.02, "epsilon_high": 0.03, "proximal_coef": 0.3},
    "ipo": {"epsilon_low": 0.02, "epsilon_high": 0.03, "proximal_coef": 0.3},
    "dro": {"proximal_coef": 0.5},
    "gmpo": {"epsilon_low": 0.1, "epsilon_high": 0.15},
    # Drawing all eligible tokens leaves nothing to chance.
    "clip_cov": {"cov_ratio": 1.0, "cov_low": 0.1, "cov_high": 2.0},
    "kl_cov": {"cov_ratio": 0.2, "kl_cov_coef": 0.5},
    "fipo": {"delta": 1.5, "fipo_half_life": 2.0, "fipo_low": 0.9, "fipo_safety_ratio": 1.1},
}
VARIANTS = [
    (name, level, aggregation)
    for name, surrogate in SURROGATES.items()
    for level in surrogate.ratio_levels
    for aggregation in AGGREGATIONS
]


def groups_of(batch, config):
    """Two prompts, their completions interleaved."""
    return torch.arange(len(batch.hidden)) % 2 if config.aggregation == "prompt_mean" else None


def fused(batch, config, **options):
    """Loss and gradients from `grpo_loss` in float64."""
    double = batch._replace(hidden=batch.hidden.double(), weight=batch.weight.double())
    return oracle.fused(double, config, group_ids_or_size=groups_of(batch, config), **options)


def assert_close(batch, config, *, on_policy=False, **options):
    groups = groups_of(batch, config)
    loss, *wanted = oracle.exact(batch, config, on_policy=on_policy, groups=groups)
    out, *grads = fused(batch, config, on_policy=on_policy, **options)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-9, abs=1e-9)
    for actual, gradient in zip(grads, wanted, strict=True):
        assert actual is None or relative_error(actual, gradient) <= 1e-9
    return out


def config_of(surrogate, level, aggregation="sequence_mean", **options):
    length = {"max_completion_length": 9} if aggregation == "fixed_length" else {}
    return LossConfig(
        surrogate=surrogate,
        ratio_level=level,
        aggregation=aggregation,
        **{**SETTINGS.get(surrogate, {}), **length, **options},
    )


def with_both_signs(batch):
    """Advantages of each sign on every length, and a zero."""
    return batch._replace(advantages=torch.tensor([0.7, -1.2, 0.0, 1.0])[: len(batch.advantages)])


@pytest.mark.parametrize("surrogate, level, aggregation", VARIANTS)
def test_every_surrogate_level_and_aggregation(surrogate, level, aggregation):
    config = config_of(surrogate, level, aggregation)
    for off_policy in (0.05, 0.5):
        batch = make_batch(off_policy=off_policy)
        assert_close(batch, config)
        assert_close(with_both_signs(batch), config)
    signs = torch.randn(batch.completion_ids.shape, generator=torch.Generator().manual_seed(1))
    assert_close(batch._replace(advantages=signs), config)
    assert_close(batch, config, frozen=True, on_policy=True)


def edges_of(config):
    """The token log-ratios at which a config's loss has a kink."""
    low, high = config.epsilon_low, config.epsilon_high
    if config.surrogate == "gmpo":
        return [-low, high]
    used = config.rule.parameters
    ratios = [config.delta] if "delta" in used and config.delta else []
    if config.surrogate == "cispo_raw":
        ratios.append(high)
    elif config.surrogate in ("ppo_clip", "cispo", "clip_cov", "fipo"):
        ratios += [1 - low, 1 + high]
    return [torch.tensor(r, dtype=torch.float64).log().item() for r in ratios] or [0.0]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_at_and_around_every_clip_edge(surrogate):
    """Each token's ratio one part in 1e6 on either side of a kink, or 1e-2, or far beyond."""
    delta = {"delta": 1.3} if surrogate == "ppo_clip" else {}
    for level in SURROGATES[surrogate].ratio_levels:
        config = config_of(surrogate, level, **delta)
        batch = with_both_signs(make_batch())
        logps = reference.token_logps(batch.hidden.double(), batch.weight.double(), batch[2])[0]
        for edge, step in itertools.product(
            edges_of(config), (-1.5, -1e-2, -1e-6, 1e-6, 1e-2, 1.5)
        ):
            lengths = batch.completion_mask.sum(1, keepdim=True).clamp(min=1)
            log_ratio = (edge + step) / (lengths if level == "sequence_sum" else 1)
            assert_close(batch._replace(old_logps=logps - log_ratio), config)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name):
    overrides = dict(SETTINGS.get(PRESETS[name].get("surrogate"), {}))
    if name == "dr_grpo":
        overrides["max_completion_length"] = 9
    if name == "dsv32":
        # Sequences beyond 1e-4 are those of the whole batch otherwise.
        overrides["off_policy_mask_threshold"] = 0.02
    for beta in ({}, {"beta": 0.1}):
        config = LossConfig.preset(name, **overrides, **beta)
        batch = make_batch(off_policy=0.3)
        assert_close(batch, config)
        assert_close(batch, config, on_policy=True)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token", "sequence_sum"])
@pytest.mark.parametrize("kl, gradient", [
    pair for pair in itertools.product(KL_ESTIMATORS, KL_GRADIENTS)
    if pair != ("k2", "straight_through")  # k2 itself: refused
])  # fmt: skip
def test_every_kl_and_its_gradient(kl, gradient, level):
    batch = make_batch(off_policy=0.5)
    for clamps in ({}, {"kl_input_clamp": 0.4, "kl_output_clamp": 0.05}):
        config = config_of("ppo_clip", level, beta=0.3, kl=kl, kl_gradient=gradient, **clamps)
        assert_close(batch, config)
        assert_close(batch, config, on_policy=True, frozen=True)


def test_kl_beside_a_constant_weight():
    """The ratio has a gradient in the penalty, none in the surrogate."""
    for surrogate, level in (("cispo", "sequence"), ("vespo", "token"), ("topr", "token")):
        config = config_of(surrogate, level, beta=0.3, kl_gradient="importance")
        assert_close(make_batch(off_policy=0.3), config)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("surrogate, level", [
    ("ppo_clip", "token"), ("ppo_clip", "sequence"), ("reinforce", "none"), ("dro", "token"),
])  # fmt: skip
@pytest.mark.parametrize("correction", [c for c in CORRECTIONS if c != "none"])
def test_every_correction(correction, surrogate, level, on_policy):
    """Bounds of which some tokens or sequences are outside, and the sampler's NaN within."""
    bounds = {"correction_min": 0.95, "correction_max": 1.05}
    if correction == "seq_mask_tis":
        bounds = {"correction_min": 0.99, "correction_max": 1.01}
    config = config_of(surrogate, level, correction=correction, **bounds, beta=0.1)
    batch = make_batch(sequences=12, off_policy=0.4)
    if on_policy:
        # The gap is the policy's own then: as small as the one before.
        logps = reference.token_logps(batch.hidden, batch.weight, batch.completion_ids)[0]
        batch = batch._replace(sampler_logps=batch.sampler_logps + logps - batch.old_logps)
    out = assert_close(batch, config, on_policy=on_policy)
    assert 0 < out.metrics["correction_clipped"] < 1
    zero = batch._replace(advantages=batch.advantages * (torch.arange(12) % 3 > 0))
    config = config_of(surrogate, level, correction=correction, **bounds)
    assert_close(zero, config, on_policy=on_policy)


@pytest.mark.parametrize("correction", ["token_tis", "icepop"])
def test_vespo_takes_the_correction_into_its_weight(correction):
    config = LossConfig.preset(
        "vespo", correction=correction, correction_min=0.96, correction_max=1.05
    )
    batch = make_batch(off_policy=0.4)
    corrected = assert_close(batch, config)
    assert_close(batch, config, on_policy=True)
    assert corrected.loss != fused(batch, LossConfig.preset("vespo"))[0].loss


@pytest.mark.parametrize("rejection", REJECTIONS[1:])
def test_every_rejection(rejection):
    """k1 is bounded as a probability ratio, on both sides; the others from above."""
    level, k = rejection.rsplit("_", 1)
    upper = 1.02 if k == "k1" else 8e-4
    if level == "seq_sum":
        upper = 1.05 if k == "k1" else 4e-3
    batch = make_batch(sequences=12, off_policy=0.4)
    for level in ("token", "sequence"):
        config = config_of("ppo_clip", level, rejection=rejection, rejection_max=upper, beta=0.1)
        out = assert_close(batch, config)
        assert 0 < out.metrics["rejected"] < 1
        assert_close(batch, config, on_policy=True)
    kept = fastgrpo.rejection_mask(
        batch.old_logps, batch.sampler_logps, batch.completion_mask, rejection, rejection_max=upper
    )
    share = 1 - kept.sum() / batch.completion_mask.sum()
    assert out.metrics["rejected_count"] == batch.completion_mask.sum()
    rejected = fused(batch, config)[0].metrics["rejected"]
    assert rejected.item() == pytest.approx(share.item(), abs=1e-6)


def test_rejected_tokens_may_leave_the_denominator():
    """`rejection_mask` as completion_mask is verl's rejection; the config's keeps them counted."""
    batch = make_batch(off_policy=0.4)
    rule = {"rejection": "token_k1", "rejection_max": 1.02}
    kept = fastgrpo.rejection_mask(batch.old_logps, batch.sampler_logps, batch[3], **rule)
    config = config_of("ppo_clip", "token", "token_mean")
    out, dhidden, _ = fused(batch._replace(completion_mask=kept), config)
    counted = config_of("ppo_clip", "token", "token_mean", **rule)
    same, dhidden_counted, _ = fused(batch, counted, normalizer=kept.sum().item())
    assert out.loss.item() == pytest.approx(same.loss.item(), rel=1e-5)
    torch.testing.assert_close(dhidden, dhidden_counted)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_off_policy_sequence_mask(level):
    batch = with_both_signs(make_batch(off_policy=0.4))
    shifted = batch.old_logps + torch.tensor([0.0, 0.5, 0.0, 0.0])[:, None]
    config = config_of("importance_sampling", level, off_policy_mask_threshold=0.2)
    for sampler in (shifted, torch.where(batch.sampler_logps.isnan(), torch.nan, shifted)):
        far = batch._replace(old_logps=shifted, sampler_logps=sampler)
        _, dhidden, _ = fused(far, config)
        assert dhidden[1].eq(0).all() and dhidden[0].ne(0).any()
        assert_close(far, config)
        assert_close(far, config_of("reinforce", "none", off_policy_mask_threshold=0.2))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta, entropy_coef", [(0.0, 0.0), (0.2, 0.1)])
def test_top_entropy_quantile(level, beta, entropy_coef):
    batch = make_batch(off_policy=0.3)
    config = config_of(
        "ppo_clip", level, top_entropy_quantile=0.3, beta=beta, entropy_coef=entropy_coef
    )
    out = assert_close(batch, config)
    assert_close(batch, config, frozen=True)
    # The ratio of a sequence depends on all of its tokens; the KL and the denominator stay.
    assert (out.metrics["live_rows"] <= 0.5) == (beta == 0 and level == "token")
    # A threshold of a larger population takes over.
    entropy = reference.token_logps(batch.hidden, batch.weight, batch.completion_ids)[1]
    threshold = entropy[batch.completion_mask].quantile(0.7)
    for given in (threshold, threshold.item()):
        same = fused(batch, config, entropy_threshold=given)[0]
        assert same.loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    assert fused(batch, config, entropy_threshold=100.0)[0].loss != out.loss


def test_ratio_to_the_sampler():
    batch = make_batch(off_policy=0.5)
    config = config_of("ppo_clip", "token", anchor="sampler")
    assert_close(batch, config)
    assert_close(batch, config_of("ppo_clip", "token", anchor="sampler", rejection="token_k1",
                                  rejection_max=1.02))  # fmt: skip
    known = batch._replace(sampler_logps=batch.sampler_logps.nan_to_num(nan=-1.0))
    plain = config_of("ppo_clip", "token")
    as_old = fused(known._replace(old_logps=known.sampler_logps), plain)[0]
    assert fused(known, config)[0].loss == as_old.loss


def test_log_ratio_clamp_has_no_gradient_outside():
    batch = make_batch(off_policy=0.5)
    for surrogate, level in (("importance_sampling", "token"), ("importance_sampling", "sequence")):
        config = config_of(surrogate, level, log_ratio_clamp=0.3)
        assert_close(batch, config)
    _, dhidden, _ = fused(batch, config_of("importance_sampling", "token", log_ratio_clamp=0.3))
    logps = fused(batch, LossConfig())[0].logps
    outside = ((logps - batch.old_logps).abs() > 0.3) & batch.completion_mask
    assert outside.any() and dhidden[outside].eq(0).all()


def test_gspo_token_is_gspo_where_advantages_are_constant():
    batch = make_batch(off_policy=0.02)
    a = fused(batch, LossConfig.preset("gspo_token", epsilon_high=0.01))
    b = fused(batch, LossConfig.preset("gspo", epsilon_high=0.01))
    torch.testing.assert_close(a[0].loss, b[0].loss)
    for x, y in zip(a[1:], b[1:], strict=True):
        torch.testing.assert_close(x, y)


def test_clip_cov_draws_the_share_it_is_told_to():
    batch = make_batch(sequences=40, length=30, off_policy=0.01)
    config = LossConfig(surrogate="clip_cov", cov_ratio=0.05, cov_low=-50.0, cov_high=50.0)
    tokens = batch.completion_mask.sum().item()
    dropped = []
    for seed in (0, 1, 0):
        out, dhidden, _ = fused(batch, config, seed=seed)
        dropped.append(dhidden.eq(0).all(-1) & batch.completion_mask)
        assert dropped[-1].sum() == int(0.05 * tokens)
        assert out.metrics["live_rows"].item() == pytest.approx(1 - int(0.05 * tokens) / tokens)
    assert torch.equal(dropped[0], dropped[2]) and not torch.equal(dropped[0], dropped[1])


def test_metrics_keep_their_digits_near_on_policy():
    """Gaps of 1e-4 nats in fp32: k3 is 5e-9, where exp(x) - 1 - x has no digit left."""
    batch = make_batch()
    arguments = (batch.hidden, batch.weight, *batch[2:5])
    logps = fastgrpo.grpo_loss(*arguments).logps
    out = fastgrpo.grpo_loss(*arguments, old_logps=logps - 1e-4, sampler_logps=logps + 1e-4)
    for name in ("approx_kl", "sampler_kl"):
        assert out.metrics[name].item() == pytest.approx(5e-9, rel=2e-2)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_takes_the_default_dtype(preset):
    """Its gradient would be of another dtype than the logits."""
    batch, config = make_batch(sequences=12), oracle.config_of(preset)
    options = {"group_ids_or_size": groups_of(batch, config)}
    torch.manual_seed(0)  # clip_cov draws
    wanted = oracle.fused(batch, config, **options)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        actual = oracle.fused(batch, config, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual[0].loss == wanted[0].loss and torch.equal(actual[1], wanted[1])


def test_numbers_do_not_take_the_default_dtype():
    batch = make_batch(sequences=12)
    config = config_of("ppo_clip", "token", correction="token_tis")
    options = {"logit_scale": 0.7, "temperature": 0.9}
    before = torch.get_default_dtype()
    wanted = fused(batch, config, **options)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = fused(batch, config, **options)
    finally:
        torch.set_default_dtype(before)
    assert actual[0].loss == wanted[0].loss and torch.equal(actual[1], wanted[1])
    logits = batch.hidden.double() @ batch.weight.double().T * 0.7 / 0.9
    exact_logps = logits.log_softmax(-1).gather(-1, batch.completion_ids[..., None])[..., 0]
    m = batch.completion_mask
    torch.testing.assert_close(wanted[0].logps[m], exact_logps[m], rtol=1e-12, atol=1e-12)


def test_a_new_surrogate_is_one_entry(monkeypatch):
    """A researcher's loss: its function, its formula and one line."""
    from fastgrpo_kernels.runtime import jit
    from fastgrpo_kernels.surrogates import Surrogate

    @jit
    def squared_gap(logp, log_ratio, advantage, context, epsilon_low):
        pull = log_ratio - epsilon_low * advantage
        return 0.5 * pull * pull, pull, advantage * 0.0

    def formula(logp, log_ratio, advantage, context, epsilon_low):
        return (log_ratio - epsilon_low * advantage) ** 2 / 2

    entry = Surrogate(squared_gap, formula, ("epsilon_low",), inert=False)
    monkeypatch.setitem(SURROGATES, "squared_gap", entry)
    for level in entry.ratio_levels:
        assert_close(make_batch(), config_of("squared_gap", level))


def test_packed_sequences_of_every_kind():
    """Sequence statistics do not see the padding."""
    batch = make_batch(off_policy=0.3)
    m = batch.completion_mask
    cu = torch.nn.functional.pad(m.sum(1).cumsum(0), (1, 0)).int()
    for config in (
        config_of("vespo", "token", log_ratio_clamp=20.0),
        config_of("gmpo", "sequence", correction="sequence_mis"),
        config_of("fipo", "token"),
        config_of("ppo_clip", "token", correction="sequence_tis", rejection="seq_max_k3",
                  rejection_max=1e-3),
        config_of("kl_cov", "token", off_policy_mask_threshold=0.05),
    ):  # fmt: skip
        padded, dhidden, _ = fused(batch, config)
        hidden = batch.hidden[m].double().requires_grad_()
        packed = fastgrpo.grpo_loss(
            hidden,
            batch.weight.double(),
            batch.completion_ids[m],
            None,
            batch.advantages,
            old_logps=batch.old_logps[m],
            sampler_logps=batch.sampler_logps[m],
            cu_seqlens=cu,
            config=config,
        )
        packed.loss.backward()
        assert packed.loss.item() == pytest.approx(padded.loss.item(), rel=1e-5)
        torch.testing.assert_close(hidden.grad, dhidden[m])


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_to_learn_from_gives_zero(name):
    length = {"max_completion_length": 9} if name == "dr_grpo" else {}
    config = LossConfig.preset(name, **length)
    for shape in ((2, 0), (0, 4), (2, 3)):
        hidden, weight = torch.randn(*shape, 8), torch.randn(11, 8)
        zeros = torch.zeros(shape)
        out = fastgrpo.grpo_loss(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            zeros.long(),
            zeros.bool(),
            torch.ones(shape[0]),
            old_logps=zeros,
            ref_logps=zeros,
            sampler_logps=zeros,
            config=config,
        )
        out.loss.backward()
        assert out.loss == 0 and hidden.grad.eq(0).all() and weight.grad.eq(0).all()
        assert all(value.isfinite() for value in out.metrics.values())


def test_gmpos_clip_counts_are_of_its_own_bounds():
    """What `log_ratio_clamp` moves is not clipped: gmpo's bounds are wider."""
    batch = make_batch(sequences=3, length=6, off_policy=0.2)
    for clamp, clipped in ((0.05, False), (None, True)):
        config = LossConfig.preset("gmpo", log_ratio_clamp=clamp, epsilon_low=0.1, epsilon_high=0.1)
        metrics = fastgrpo.grpo_loss(*batch[:5], old_logps=batch.old_logps, config=config).metrics
        assert (metrics["clip_region"] > 0) == clipped
