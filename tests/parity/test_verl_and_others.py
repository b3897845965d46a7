"""The losses of verl, OpenRLHF and ROLL, as each of them computes it.

The formulas are in plain torch on padded batches, with the trainers' names for the settings, and
autograd differentiates them in float64. None of these trainers is installed: the formulas are
taken from their sources.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastgrpo import LossConfig
from padded_rollout import Rollout

# ---- verl ----------------------------------------------------------------------------------------


def verl_ratio(r):
    return (r.logps - r.old).clamp(-20, 20).exp()


def verl_vanilla(r, clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=3.0):
    """Losses, of which the larger counts; no worse than c times -A where A is negative."""
    ratio = verl_ratio(r)
    clipped = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    pessimistic = torch.maximum(-r.A * ratio, -r.A * clipped)
    return torch.where(r.A < 0, torch.minimum(pessimistic, -r.A * clip_ratio_c), pessimistic)


def test_verl_vanilla(far, equal):
    out = equal(lambda r: r.token_mean(verl_vanilla(r)), "verl_default", batch=far)
    assert out.metrics["ratio_max"] > 3 and out.metrics["clip_region"] > 0
    wide = LossConfig.preset("verl_default", epsilon_low=0.1, epsilon_high=0.5, delta=1.7)
    equal(lambda r: r.token_mean(verl_vanilla(r, 0.1, 0.5, 1.7)), wide, batch=far)


@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum",
                                  "seq-mean-token-sum-norm", "seq-mean-token-mean"])  # fmt: skip
def test_verl_aggregation(mode, rollout, equal):
    """Sequences without a token are not among verl's when it counts them itself; where the step's
    count is given, as its trainers do, they are. Here: 8 sequences, one of them empty.
    """
    aggregation, normalizer = {
        "token-mean": ("token_mean", None),
        "token-sum": ("token_sum", None),
        "seq-mean-token-sum": ("sequence_sum", 7),
        # Its horizon is the padded width unless it is told
        "seq-mean-token-sum-norm": ("fixed_length", 7 * 9),
        "seq-mean-token-mean": ("sequence_mean", 7),
    }[mode]

    def loss(r):
        losses = torch.where(r.mask, verl_vanilla(r), 0.0)
        live = r.lengths > 0
        assert live.sum() == 7
        if mode == "token-mean":
            return losses.sum() / r.mask.sum()
        if mode == "token-sum":
            return losses.sum()
        sums = losses.sum(1)[live]
        if mode == "seq-mean-token-mean":
            return (sums / r.lengths[live]).mean()
        return sums.mean() / (9 if mode.endswith("norm") else 1)

    config = LossConfig.preset("verl_default", aggregation=aggregation)
    equal(loss, config, normalizer=normalizer)


@pytest.mark.parametrize("mode, normalizer", [("token-mean", None), ("seq-mean-token-mean", 7)])
def test_verl_gspo(mode, normalizer, rollout, equal):
    """Its ratio is that of the sequence in value, a token's in gradient; bounded by e^10.

    Since 0.9.1 `loss_agg_mode` holds here too. Its default is the mean over tokens.
    """
    advantages = torch.randn(rollout.completion_ids.shape, generator=torch.manual_seed(1))
    batch = rollout._replace(advantages=advantages)

    def loss(r):
        log_s = r.logps - r.logps.detach() + r.sequence_mean(r.logps - r.old).detach()
        s = log_s.clamp(max=10).exp()
        losses = torch.maximum(-r.A * s, -r.A * s.clamp(1 - 0.02, 1 + 0.03))
        if mode == "token-mean":
            return r.token_mean(losses)
        return r.sequence_mean(losses)[r.lengths > 0].mean()

    options = {"aggregation": "token_mean"} if mode == "token-mean" else {}
    config = LossConfig.preset("gspo_token", epsilon_low=0.02, epsilon_high=0.03, **options)
    out = equal(loss, config, batch=batch, normalizer=normalizer)
    assert out.metrics["clip_low"] > 0 and out.metrics["clip_high"] > 0


@pytest.mark.parametrize("clip_ratio_c", [20.0, 1.3])
def test_verl_dppo_tv(clip_ratio_c, rollout, equal):
    low, high = 0.02, 0.05

    def loss(r):
        moved = (r.logps.exp() - r.old.exp()).detach()
        valid = torch.where(r.A > 0, moved <= high, moved >= -low)
        weight = verl_ratio(r).clamp(max=clip_ratio_c).detach()
        return r.token_mean(-r.A * weight * r.logps * valid)

    config = LossConfig.preset("dppo_tv", epsilon_low=low, epsilon_high=high, delta=clip_ratio_c)
    out = equal(loss, config)
    assert out.metrics["clip_low"] > 0 and out.metrics["clip_high"] > 0


@pytest.mark.parametrize("clip_ratio_c", [20.0, 1.3])
def test_verl_dppo_kl(clip_ratio_c, rollout, equal):
    low, high = 0.001, 0.005

    def loss(r):
        p, old = r.logps.detach().exp(), r.old.exp()
        stay = torch.log((1 - old + 1e-8) / (1 - p + 1e-8))
        divergence = old * (r.old - r.logps.detach()) + (1 - old) * stay
        up = (divergence <= high) | (p <= old)
        down = (divergence <= low) | (p >= old)
        weight = verl_ratio(r).clamp(max=clip_ratio_c).detach()
        return r.token_mean(-r.A * weight * r.logps * torch.where(r.A > 0, up, down))

    config = LossConfig.preset("dppo_kl", epsilon_low=low, epsilon_high=high, delta=clip_ratio_c)
    out = equal(loss, config)
    assert out.metrics["clip_low"] > 0 and out.metrics["clip_high"] > 0


def covariance(r):
    logps = r.logps.detach()
    return (r.A - r.token_mean(r.A)) * (logps - r.token_mean(logps))


def test_verl_clip_cov(rollout, equal):
    """clip_cov_ratio 1: all eligible tokens are dropped, whatever the order they are drawn in."""
    low, high = 0.2, 1.5

    def loss(r):
        ratio = (r.logps - r.old).exp()
        plain, clipped = -r.A * ratio, -r.A * ratio.clamp(0.8, 1.2)
        eligible = (covariance(r) > low) & (covariance(r) < high) & ~(clipped > plain) & r.mask
        assert 0 < eligible.sum() < r.mask.sum()
        return r.token_mean(torch.maximum(plain, clipped) * ~eligible)

    equal(loss, LossConfig.preset("clip_cov", cov_ratio=1.0, cov_low=low, cov_high=high))


@pytest.mark.parametrize("kl_cov_ratio", [2e-4, 0.25])
def test_verl_kl_cov(kl_cov_ratio, rollout, equal):
    def loss(r):
        gap = r.logps - r.old
        terms = covariance(r).masked_fill(~r.mask, -math.inf).flatten()
        highest = terms.topk(max(1, int(kl_cov_ratio * r.mask.sum().item()))).indices
        chosen = torch.zeros_like(terms).index_fill(0, highest, 1.0).view_as(gap)
        return r.token_mean(-r.A * gap.exp() + 0.7 * gap.abs() * chosen)

    equal(loss, LossConfig.preset("kl_cov", cov_ratio=kl_cov_ratio, kl_cov_coef=0.7))


def test_verl_geo_mean(rollout, equal):
    """Each token's log-ratio is bounded towards the pessimistic side of its advantage's sign."""
    low, high = 0.1, 0.3

    def loss(r):
        sign, gap = r.A.sign(), r.logps - r.old
        bounded = sign * torch.minimum(sign * gap, sign * gap.clamp(-low, high))
        advantage = r.sequence_mean(r.A)
        return (-advantage * r.sequence_mean(bounded).exp()).mean()

    out = equal(loss, LossConfig.preset("gmpo", epsilon_low=low, epsilon_high=high))
    assert out.metrics["clip_low"] > 0 and out.metrics["clip_high"] > 0


def test_verl_dro(rollout, equal):
    def loss(r):
        return r.token_mean(-(r.logps * r.A - 0.4 / 2 * (r.logps - r.old).square()))

    equal(loss, LossConfig.preset("dro", proximal_coef=0.4))


def test_verl_cispo(rollout, equal):
    def loss(r):
        return r.token_mean(-verl_ratio(r).clamp(0.9, 1.3).detach() * r.A * r.logps)

    out = equal(loss, LossConfig.preset("cispo", epsilon_low=0.1, epsilon_high=0.3))
    assert out.metrics["clip_low"] > 0 and out.metrics["clip_high"] > 0


def test_verl_sapo(rollout, equal):
    def loss(r):
        tau = torch.where(r.A > 0, 0.8, 1.5).double()
        gate = torch.sigmoid(tau * (verl_ratio(r) - 1)) * (4 / tau)
        return r.sequence_mean(-gate * r.A)[r.lengths > 0].mean()

    # In float32, as `where` makes it of two numbers.
    pos, neg = (torch.tensor(t).item() for t in (0.8, 1.5))
    config = LossConfig.preset("sapo", sapo_temperature_pos=pos, sapo_temperature_neg=neg)
    equal(loss, config, normalizer=7)


def test_verl_gpg(rollout, equal):
    equal(lambda r: r.token_mean(-r.logps * r.A), "reinforce")


@pytest.mark.parametrize("name, kl, gradient", [
    ("k1", "k1", "value"),
    ("abs", "abs", "value"),
    ("mse", "k2", "value"),
    ("low_var_kl", "k3", "value"),
    ("k1+", "k1", "straight_through"),
    ("k3+", "k3", "straight_through"),
])  # fmt: skip
def test_verl_kl_loss(name, kl, gradient, far, equal):
    """k3 alone is bounded, its log-ratio to 20 nats and its value to 10; k2's gradient is not."""
    ref = far.ref_logps.clone()
    ref[0, 0], ref[1, 0], ref[2, 0] = -40.0, -1e-4, -1e-4
    batch = far._replace(ref_logps=ref)

    def loss(r):
        x = r.ref - r.logps
        bounded = x.clamp(-20, 20)
        value = {
            "k1": -x,
            "abs": x.abs(),
            "k2": x.square() / 2,
            "k3": (bounded.exp() - bounded - 1).clamp(-10, 10),
        }[kl]
        if name.endswith("+"):
            k2 = x.square() / 2
            value = value.detach() + k2 - k2.detach()
        return r.token_mean(verl_vanilla(r) + 0.3 * value)

    clamps = {"kl_input_clamp": 20.0, "kl_output_clamp": 10.0} if kl == "k3" else {}
    config = LossConfig.preset("verl_default", beta=0.3, kl=kl, kl_gradient=gradient, **clamps)
    equal(loss, config, batch=batch)


# ---- OpenRLHF ------------------------------------------------------------------------------------


def openrlhf_ppo(r, dual_clip=None):
    ratio = (r.logps - r.old).clamp(-20, 20).exp()
    objective = torch.minimum(ratio * r.A, ratio.clamp(0.8, 1.2) * r.A)
    if dual_clip is None:
        return -objective
    return -torch.where(r.A < 0, torch.maximum(objective, dual_clip * r.A), objective)


def test_openrlhf(far, equal):
    equal(lambda r: r.token_mean(openrlhf_ppo(r)), "openrlhf_rf++", batch=far)


def test_openrlhf_dual_clip(far, equal):
    config = LossConfig.preset("openrlhf_rf++", delta=3.0)
    equal(lambda r: r.token_mean(openrlhf_ppo(r, dual_clip=3.0)), config, batch=far)


def test_openrlhf_sequence_mean(far, equal):
    """Sequences without a token do not count: 7 of 8."""
    config = LossConfig.preset("openrlhf_rf++", aggregation="sequence_mean")

    def loss(r):
        return r.sequence_mean(openrlhf_ppo(r)).sum() / (r.lengths > 0).sum()

    equal(loss, config, batch=far, normalizer=7)


@pytest.mark.parametrize("corrects", [False, True])
def test_openrlhf_gspo(corrects, corrected, equal):
    """With the correction the ratio is to the sampler, and has no other weight."""
    batch, _, _ = corrected("tis")

    def loss(r):
        gap = r.logps - (r.sampler if corrects else r.old)
        ratio = r.sequence_mean(gap).exp()
        losses = -torch.minimum(ratio * r.A, ratio.clamp(0.98, 1.03) * r.A)
        return r.sequence_mean(losses).sum() / (r.lengths > 0).sum()

    anchor = "sampler" if corrects else "old"
    config = LossConfig.preset("gspo", anchor=anchor, epsilon_low=0.02, epsilon_high=0.03)
    out = equal(loss, config, batch=batch, normalizer=7)
    assert out.metrics["clip_low"] > 0 and out.metrics["clip_high"] > 0


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_openrlhf_kl_loss(kl, far, equal):
    """Both are bounded by 10 in value, and k3's exponent as well, where its value is beyond 10."""
    ref = far.ref_logps.clone()
    ref[0, 0], ref[1, 0] = -40.0, 40.0
    batch = far._replace(ref_logps=ref)

    def loss(r):
        gap = r.logps - r.ref
        held = gap.clamp(min=-10)
        value = gap.square() / 2 if kl == "k2" else (-held).exp() - 1 + held
        assert (value[r.mask] > 10).any()
        return r.token_mean(openrlhf_ppo(r) + 0.3 * value.clamp(-10, 10))

    config = LossConfig.preset("openrlhf_rf++", beta=0.3, kl=kl, kl_output_clamp=10.0)
    equal(loss, config, batch=batch)


@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_openrlhf_unbiased_kl_gradient(kl, rollout, equal):
    """The value of either is bounded, the gradient that of k2. Its weight is 1 on-policy."""
    ref = rollout.ref_logps.clone()
    ref[0, 0] = -40.0

    def loss(r):
        gap = r.logps - r.ref
        value = (gap if kl == "k1" else (-gap).exp() - 1 + gap).clamp(-10, 10)
        surrogate = gap.square() / 2
        kl_loss = value.detach() + surrogate - surrogate.detach()
        r.old = r.logps.detach()
        return r.token_mean(openrlhf_ppo(r) + 0.3 * kl_loss)

    config = LossConfig.preset(
        "openrlhf_rf++", beta=0.3, kl=kl, kl_output_clamp=10.0, kl_gradient="straight_through"
    )
    equal(loss, config, batch=rollout._replace(ref_logps=ref), on_policy=True)


@pytest.mark.parametrize("level, mode, kind", [
    ("token", "clip", "tis"),
    ("token", "mask", "icepop"),
    ("seq", "mask", "seq-mask-tis"),
])  # fmt: skip
def test_openrlhf_correction(level, mode, kind, corrected, equal):
    """Level seq decides by the sequence's geometric mean, and leaves a token's weight as it is."""
    batch, (low, high), config = corrected(kind)

    def loss(r):
        gap = r.old - r.sampler
        judged = (r.sequence_mean(gap) if level == "seq" else gap).exp()
        kept = (judged >= low) & (judged <= high)
        weight = judged.clamp(low, high) if mode == "clip" else gap.exp() * kept
        return r.token_mean(weight * openrlhf_ppo(r))

    config = LossConfig.preset("openrlhf_rf++", **config)
    out = equal(loss, config, batch=batch)
    assert 0 < out.metrics["correction_clipped"] < 1


@pytest.mark.parametrize("gating, level, delta", [
    ("binary_kl", "token", 5e-4),
    ("binary_kl", "seq", 3e-3),
    ("tv", "token", 1e-2),
    ("tv", "seq", 2e-2),
])  # fmt: skip
def test_openrlhf_divergence_gate(gating, level, delta, corrected, equal):
    """What a gate drops is out of our mask, and stays in the count that we are given."""
    batch, _, _ = corrected("tis")
    whole = Rollout(batch)
    p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (whole.sampler, whole.old))
    if gating == "tv":
        statistic = (p - q).abs()
    else:
        statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    if level == "seq":
        statistic = whole.sequence_mean(statistic)
    kept = whole.mask & (statistic <= delta)
    assert 0 < kept.sum() < whole.mask.sum()

    def loss(r):
        weight = torch.where(kept, (whole.old - whole.sampler).exp(), 0.0)
        return (weight * openrlhf_ppo(r))[whole.mask].sum() / whole.mask.sum()

    config = LossConfig.preset("openrlhf_rf++", correction="token_tis", correction_max=1e9)
    count = whole.mask.sum().item()
    equal(loss, config, batch=batch._replace(completion_mask=kept), normalizer=count)


# ---- ROLL ----------------------------------------------------------------------------------------


def test_roll_tis(rollout, equal):
    """Its weight is bounded to [0, 1]."""

    def loss(r):
        weight = (r.logps - r.old).exp().clamp(0.0, 1.0).detach()
        return r.sequence_mean(-weight * r.A * r.logps).mean()

    equal(loss, "tis_pg")


def test_roll_topr(rollout, equal):
    """ROLL goes by the sign of the score. The paper's is that of the return, and so ours: A's."""

    def loss(r):
        weight = (r.logps - r.old).exp().clamp(0.0, 1.0).detach()
        positive, negative = -r.A * r.logps, -weight * r.A * r.logps
        return r.sequence_mean(torch.where(r.A > 0, positive, negative)).mean()

    equal(loss, "topr")


def test_roll_kimi15(rollout, equal):
    """tau / 2 times the square of each token's log-ratio."""

    def loss(r):
        return r.sequence_mean(-r.A * r.logps + 0.1 / 2 * (r.logps - r.old).square()).mean()

    equal(loss, LossConfig.preset("dro", aggregation="sequence_mean"))


def test_roll_dual_clip(far, equal):
    """Bounds the loss of negative advantages by 1 + 2 pg_clip, not by a setting of its own."""

    def loss(r):
        ratio = (r.logps - r.old).exp()
        objective = torch.minimum(ratio * r.A, ratio.clamp(0.8, 1.2) * r.A)
        dual = torch.maximum(objective, (1 + 2 * 0.2) * r.A)
        return r.sequence_mean(-torch.where(r.A < 0, dual, objective)).mean()

    old = far.old_logps.clone()
    old[:2, 0] = -1.0  # nor does ROLL
    equal(loss, LossConfig(delta=1.4), batch=far._replace(old_logps=old))
