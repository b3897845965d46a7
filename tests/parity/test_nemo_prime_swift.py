"""The losses of NeMo-RL, prime-rl and ms-swift, as each of them computes it.

The formulas are in plain torch on padded batches, with the trainers' names for the settings, and
autograd differentiates them in float64. None of these trainers is installed: the formulas are
taken from their sources.
"""

from __future__ import annotations

import pytest
import torch

from fastgrpo import LossConfig
from padded_rollout import Rollout

HALF_LIFE = 3.0  # tokens, of FIPO's discount

# ---- NeMo-RL -------------------------------------------------------------------------------------


def nemo_kl(r, input_clamp, output_clamp):
    """k3 times exp(logp - sg(logp)), which is a constant where the input is clamped; then clamped
    itself.
    """
    x = r.ref - r.logps
    bounded = x.clamp(-input_clamp, input_clamp)
    weight = (r.logps - r.logps.detach()).exp()
    weight = torch.where(x == bounded, weight, weight.detach())
    return (weight * (bounded.exp() - 1 - bounded)).clamp(-output_clamp, output_clamp)


def nemo_clip(r, low=0.2, high=0.2):
    ratio = (r.logps - r.old).exp()
    return torch.maximum(-r.A * ratio, -r.A * ratio.clamp(1 - low, 1 + high))


@pytest.mark.parametrize("penalty", [0.01, 0.3])
def test_nemo_grpo(penalty, rollout, equal):
    def loss(r):
        return r.token_mean(nemo_clip(r)) + penalty * r.token_mean(nemo_kl(r, 20.0, 10.0))

    equal(loss, LossConfig.preset("nemo_grpo", beta=penalty))
    assert LossConfig.preset("nemo_grpo").beta == 0.01


@pytest.mark.parametrize("input_clamp, output_clamp", [(0.3, 10.0), (20.0, 0.05), (0.4, 0.05)])
def test_nemo_kl_beyond_its_clamps(input_clamp, output_clamp, rollout, equal):
    def loss(r):
        kl = nemo_kl(r, input_clamp, output_clamp)
        return r.token_mean(nemo_clip(r)) + 0.3 * r.token_mean(kl)

    config = LossConfig.preset(
        "nemo_grpo", beta=0.3, kl_input_clamp=input_clamp, kl_output_clamp=output_clamp
    )
    equal(loss, config)


def test_nemo_dual_clip_and_sequence_mean(far, equal):
    """ratio_clip_c, and token_level_loss=False: the mean over sequences, the empty one among them
    where `sample_mask` has it.
    """

    def loss(r):
        dual = torch.where(r.A < 0, torch.minimum(nemo_clip(r), -r.A * 3.0), nemo_clip(r))
        return r.sequence_mean(dual).mean()

    old = far.old_logps.clone()
    old[:2, 0] = -1.0  # NeMo-RL does not bound log-ratios
    equal(loss, LossConfig(delta=3.0), batch=far._replace(old_logps=old))


def test_nemo_cispo(rollout, equal):
    def loss(r):
        weight = (r.logps - r.old).exp().clamp(0.8, 1.3)
        return r.token_mean(-r.A * weight.detach() * r.logps)

    equal(loss, LossConfig.preset("cispo", epsilon_high=0.3))


@pytest.mark.parametrize("kind", ["tis", "icepop", "seq-mask-tis"])
def test_nemo_correction(kind, corrected, equal):
    """The weight is on the actor's loss alone; tokens it drops stay in the denominator."""
    batch, (low, high), config = corrected(kind)

    def loss(r):
        gap = r.old - r.sampler
        judged = (r.sequence_mean(gap) if kind == "seq-mask-tis" else gap).exp()
        kept = (judged >= low) & (judged <= high)
        weight = gap.exp().clamp(low, high) if kind == "tis" else torch.where(kept, gap.exp(), 0.0)
        return r.token_mean(weight * nemo_clip(r)) + 0.01 * r.token_mean(nemo_kl(r, 20.0, 10.0))

    equal(loss, LossConfig.preset("nemo_grpo", **config), batch=batch)


def test_nemo_sequence_level(corrected, equal):
    """sequence_level_importance_ratios: GSPO, its weights the product over the sequence."""
    batch = corrected("tis")[0]

    def loss(r):
        s = r.sequence_mean(r.logps - r.old).exp()
        losses = torch.maximum(-r.A * s, -r.A * s.clamp(0.97, 1.03))
        weight = torch.where(r.mask, r.old - r.sampler, 0.0).sum(1, keepdim=True).exp()
        return r.sequence_mean(weight.clamp(0.9, 1.1) * losses).mean()

    config = LossConfig(
        ratio_level="sequence", epsilon_low=0.03, epsilon_high=0.03,
        correction="sequence_tis", correction_min=0.9, correction_max=1.1,
    )  # fmt: skip
    out = equal(loss, config, batch=batch)
    assert 0 < out.metrics["correction_clipped"] < 1


def test_nemo_without_a_ratio(rollout, equal):
    """force_on_policy_ratio, and disable_ppo_ratio: the loss is -A in value, and -A logp."""
    equal(
        lambda r: r.token_mean(-r.A * (r.logps - r.logps.detach()).exp()),
        LossConfig(surrogate="importance_sampling", aggregation="token_mean"),
        on_policy=True,
    )
    equal(lambda r: r.token_mean(-r.A * r.logps), "reinforce")


def test_nemo_tokens_that_the_sampler_has_not_scored(rollout, equal):
    """Deviation: NeMo-RL gives a NaN the weight 0; TRL and we 1, as nothing is known of it."""
    unscored = rollout.sampler_logps.clone()
    unscored[:, 0] = torch.nan

    def loss(r, of_nan=1.0):
        weight = (r.old - r.sampler).exp().nan_to_num(nan=of_nan).clamp(0, 1.02)
        return r.token_mean(weight * nemo_clip(r))

    batch = rollout._replace(sampler_logps=unscored)
    config = LossConfig(aggregation="token_mean", correction="token_tis", correction_max=1.02)
    out = equal(loss, config, batch=batch)
    assert out.loss.item() != pytest.approx(loss(Rollout(batch), of_nan=0.0).item(), rel=1e-3)


# ---- prime-rl ------------------------------------------------------------------------------------


def prime(r, kept, kl_tau):
    """Over the step's tokens; the ratio is to the sampler."""
    gap = r.logps - r.sampler
    return r.token_mean(-(kept * r.A * gap.exp()) + kl_tau * gap.square())


@pytest.fixture
def scored(rollout):
    """A sampler that has scored every token, and is some way off."""
    return rollout._replace(sampler_logps=rollout.ref_logps)


@pytest.mark.parametrize("tokens", [None, 1000])
@pytest.mark.parametrize("low, high, kl_tau", [(0.2, 0.2, 1e-3), (0.04, 0.06, 0.2)])
def test_prime_default(low, high, kl_tau, tokens, scored, equal):
    def loss(r):
        count = r.mask.sum().item()
        moved = (r.logps.exp() - r.sampler.exp()).detach()
        dropped = torch.where(r.A > 0, moved > high, moved < -low)
        assert 0 < (dropped & r.mask).sum() < r.mask.sum()
        return prime(r, ~dropped, kl_tau) * (count / (tokens or count))

    config = LossConfig.preset(
        "prime_dppo", epsilon_low=low, epsilon_high=high, proximal_coef=2 * kl_tau
    )
    assert config == LossConfig.preset("prime_dppo") or low != 0.2
    equal(loss, config, batch=scored, normalizer=tokens)


def test_prime_ipo(scored, equal):
    def loss(r):
        dropped = (r.logps.exp() - r.sampler.exp()).detach().abs() > 0.05
        assert 0 < (dropped & r.mask).sum() < r.mask.sum()
        return prime(r, ~dropped, 1e-3)

    equal(loss, LossConfig.preset("ipo", epsilon_low=0.05, epsilon_high=0.05), batch=scored)


# ---- ms-swift ------------------------------------------------------------------------------------


def swift_fipo(r, index, delta=None, low=1.0, high=1.2, safety=4.0):
    """PPO-clip times the clipped exponential of the log-ratios from each token on, discounted by
    the distance of their indices (B, T).
    """
    gap = r.logps - r.old
    ratio, held = gap.exp(), gap.detach()
    moved = held if delta is None else torch.where(held.exp() > delta, 0.0, held)
    later = torch.ones(held.shape[1], held.shape[1]).triu().bool()
    distance = (index[:, None] - index[:, :, None]).double()
    decay = torch.where(later, 2.0 ** (-distance / HALF_LIFE), 0.0)
    influence = (decay @ moved[..., None])[..., 0].exp().clamp(low, high)
    if safety is not None:
        risky = (r.A < 0) & (held.exp() > safety)
        assert safety > 2 or 0 < (risky & r.mask).sum() < r.mask.sum()
        influence = torch.where(risky, influence.clamp(0.8, 1.0), influence)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    losses = -torch.minimum(bounded * r.A, ratio.clamp(0.8, 1.2) * r.A)
    return r.token_mean(losses * influence)


@pytest.mark.parametrize("delta, low, high, safety", [
    (None, 1.0, 1.2, 4.0),
    (1.5, 1.0, 1.2, 1.1),
    (None, 0.7, 1.3, None),
])  # fmt: skip
def test_swift_fipo(delta, low, high, safety, rollout, equal):
    config = LossConfig.preset(
        "fipo", delta=delta, fipo_half_life=HALF_LIFE, fipo_low=low, fipo_high=high,
        fipo_safety_ratio=safety,
    )  # fmt: skip
    positions = torch.arange(9).expand(8, 9)
    equal(lambda r: swift_fipo(r, positions, delta, low, high, safety), config)


def test_swift_fipo_amid_a_tools_tokens(rollout, equal):
    """Deviation: to ms-swift masked tokens are distance. To us a completion is its unmasked tokens,
    whether padded or packed.
    """
    mask = rollout.completion_mask.clone()
    mask[0, 2:5] = False
    batch = rollout._replace(completion_mask=mask)
    config = LossConfig.preset("fipo", fipo_half_life=HALF_LIFE)
    out = equal(lambda r: swift_fipo(r, mask.cumsum(1)), config, batch=batch)
    theirs = swift_fipo(Rollout(batch), torch.arange(9).expand(8, 9))
    assert out.loss.item() != pytest.approx(theirs.item(), rel=1e-3)
