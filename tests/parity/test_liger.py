"""Every loss of Liger 0.8.5, through `LigerFusedLinearGRPOLoss`: value, gradients and metrics.

Liger computes in float32, and so does `grpo_loss` here. Two bugs of earlier releases are fixed in
0.8.5: the normalizer of a step (tested below), and the gradient of the corrected KL at sequence
level, in the Triton path that starts from logits and is not run here.
"""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig, reference
from fastgrpo.testing import relative_error

pytest.importorskip("liger_kernel")

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # noqa: E402

L_MAX = 16
TOKENS = {"aggregation": "token_mean"}
SEQUENCE = {"ratio_level": "sequence"}
FIXED = {"aggregation": "fixed_length", "max_completion_length": L_MAX}
LUSPO = {"aggregation": "sequence_sum"}
CISPO = {"surrogate": "cispo_raw", "epsilon_high": 1.2, **TOKENS}
VESPO = {
    "surrogate": "vespo", "log_ratio_clamp": 20.0, **TOKENS,
}  # fmt: skip
GSPO = {"importance_sampling_level": "sequence"}
KL = {"beta": 0.3}
UNBIASED = {"beta": 0.3, "kl_gradient": "importance"}
CORRECTED = {"beta": 0.3, "use_bias_correction_kl": True}
TIS = {"correction": "token_tis", "correction_max": 1.02}
MIS = {"correction": "sequence_mis", "correction_max": 1.05}

# What is given to Liger, and to LossConfig; beta is 0 where not given.
CASES = {
    "grpo": ({"loss_type": "grpo"}, {}),
    "bnpo": ({"loss_type": "bnpo"}, TOKENS),
    "dapo": ({"loss_type": "dapo"}, TOKENS),
    "dr_grpo": ({"loss_type": "dr_grpo", "max_completion_length": L_MAX}, FIXED),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, CISPO),
    "sapo": ({"loss_type": "sapo"}, {"surrogate": "sapo"}),
    "vespo": ({"loss_type": "vespo"}, VESPO),
    "grpo, sequence": ({"loss_type": "grpo", **GSPO}, SEQUENCE),
    "bnpo, sequence": ({"loss_type": "bnpo", **GSPO}, {**TOKENS, **SEQUENCE}),
    "dapo, sequence": ({"loss_type": "dapo", **GSPO}, {**TOKENS, **SEQUENCE}),
    "dr_grpo, sequence": (
        {"loss_type": "dr_grpo", "max_completion_length": L_MAX, **GSPO},
        {**FIXED, **SEQUENCE},
    ),
    "luspo, sequence": ({"loss_type": "luspo", **GSPO}, {**LUSPO, **SEQUENCE}),
    "grpo, bounds": (
        {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.3, "delta": 1.5},
        {"epsilon_low": 0.1, "epsilon_high": 0.3, "delta": 1.5},
    ),
    "grpo, sequence, bounds": (
        {"loss_type": "grpo", **GSPO, "epsilon_low": 0.05, "epsilon_high": 0.02, "delta": 1.1},
        {**SEQUENCE, "epsilon_low": 0.05, "epsilon_high": 0.02, "delta": 1.1},
    ),
    "sapo, temperatures": (
        {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
        {"surrogate": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
    ),
    "vespo, shapes": (
        {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_neg": 1.0},
        {**VESPO, "vespo_k_pos": 1.5, "vespo_lambda_neg": 1.0},
    ),
    "grpo, kl": ({"loss_type": "grpo", **KL}, KL),
    "dapo, kl": ({"loss_type": "dapo", **KL}, {**TOKENS, **KL}),
    "cispo, kl": ({"loss_type": "cispo", "epsilon_high": 1.2, **KL}, {**CISPO, **KL}),
    "sapo, kl": ({"loss_type": "sapo", **KL}, {"surrogate": "sapo", **KL}),
    "vespo, kl": ({"loss_type": "vespo", **KL}, {**VESPO, **KL}),
    "grpo, sequence, kl": ({"loss_type": "grpo", **GSPO, **KL}, {**SEQUENCE, **KL}),
    "grpo, corrected kl": ({"loss_type": "grpo", **CORRECTED}, UNBIASED),
    "grpo, sequence, corrected kl": (
        {"loss_type": "grpo", **GSPO, **CORRECTED},
        {**SEQUENCE, **UNBIASED},
    ),
    "dapo, temperature": ({"loss_type": "dapo", "temperature": 0.75}, TOKENS),
    "dapo, token weights": ({"loss_type": "dapo"}, {**TOKENS, **TIS}),
    "grpo, sequence weights": ({"loss_type": "grpo"}, MIS),
    "vespo, token weights": ({"loss_type": "vespo"}, {**VESPO, **TIS}),
}  # fmt: skip


@pytest.fixture
def batch(rollout):
    """With the sampler's gap large enough to be corrected."""
    gap = (rollout.sampler_logps - rollout.old_logps).nan_to_num(nan=0.0)
    return rollout._replace(sampler_logps=rollout.old_logps + 3 * gap)


def liger(batch, *, weights=None, tokens=None, **options):
    """Liger's loss and gradients of hidden, weight and bias; its metrics."""
    hidden, weight, bias = leaves(batch)
    options = {"beta": 0.0, "compiled": False, **options}
    fused = LigerFusedLinearGRPOLoss(use_ref_model=options["beta"] != 0, **options)
    loss, metrics = fused(
        hidden, weight, batch.completion_ids, batch.completion_mask.float(), batch.advantages, bias,
        ref_per_token_logps=batch.ref_logps, old_per_token_logps=batch.old_logps,
        vllm_is_ratio=weights, num_items_in_batch=tokens,
    )  # fmt: skip
    return loss, torch.autograd.grad(loss, (hidden, weight, bias)), metrics


def ours(batch, config, **options):
    hidden, weight, bias = leaves(batch)
    out = fastgrpo.grpo_loss(
        hidden, weight, *batch[2:5], bias=bias, old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        sampler_logps=batch.sampler_logps if config.needs_sampler else None,
        config=config, **options,
    )  # fmt: skip
    return out.loss, torch.autograd.grad(out.loss, (hidden, weight, bias)), out.metrics


def leaves(batch):
    bias = torch.linspace(-1, 1, len(batch.weight))
    return [x.clone().requires_grad_() for x in (batch.hidden, batch.weight, bias)]


def assert_same(theirs, ours):
    # Terms of order 1 cancel in a loss.
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-5, abs=1e-6)
    for actual, wanted in zip(ours[1], theirs[1], strict=True):
        assert wanted.norm() > 1e-3 and relative_error(actual, wanted) <= 1e-5


def sampling_ratio(batch, config):
    """Liger's `vllm_is_ratio`, (B, T) or (B, 1), which it expects from its caller: 1 at pads."""
    gap = (batch.old_logps - batch.sampler_logps).masked_fill(~batch.completion_mask, 0.0)
    high = config.correction_bounds[1]
    if config.correction == "token_tis":
        return gap.exp().clamp(max=high)
    ratio = gap.sum(1, keepdim=True).exp()
    return torch.where(ratio > high, 0.0, ratio)


@pytest.mark.parametrize("case", CASES)
def test_every_loss(case, batch):
    given, wanted = CASES[case]
    config = LossConfig(**wanted)
    weights = sampling_ratio(batch, config) if config.needs_sampler else None
    temperature = given.get("temperature", 1.0)
    theirs = liger(batch, weights=weights, **given)
    actual = ours(batch, config, temperature=temperature)
    assert_same(theirs, actual)
    *kl, clipped = theirs[2]
    if config.surrogate == "ppo_clip" and config.delta is None:
        assert clipped > 0
        assert actual[2]["clip_region"].item() == pytest.approx(clipped.item(), rel=1e-5)
    if config.beta and config.kl_gradient == "value":
        assert actual[2]["kl"].item() == pytest.approx(kl[0].item(), rel=1e-5)


@pytest.mark.parametrize("case", ["dapo", "cispo", "vespo"])
def test_normalizer_of_an_optimizer_step(case, batch):
    """`num_items_in_batch`, which Liger did not take before."""
    given, wanted = CASES[case]
    theirs = liger(batch, tokens=300, **given)
    assert_same(theirs, ours(batch, LossConfig(**wanted), normalizer=300))


@pytest.mark.parametrize("given, wanted", [
    ({}, {}),
    ({**GSPO, **KL}, {**SEQUENCE, **KL}),
])  # fmt: skip
def test_luspo_with_a_value_per_token(given, wanted, batch):
    """Deviation: where its loss has a value per token, Liger takes the mean over all T positions,
    pads among them, times the length. Right is the sum over a completion's tokens; the two agree
    where there are no pads.
    """
    lengths = batch.completion_mask.sum(1, keepdim=True)
    config = LossConfig(**LUSPO, **wanted)

    def per_token(batch):
        hidden, weight, bias = leaves(batch)
        logps = reference.token_logps(hidden, weight, batch.completion_ids, bias=bias)[0]
        gap = logps - batch.old_logps
        if given:
            gap = (gap * batch.completion_mask).sum(1, keepdim=True) / lengths.clamp(min=1)
        A, ratio, x = batch.advantages[:, None], gap.exp(), batch.ref_logps - logps
        policy = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
        return policy + given.get("beta", 0.0) * (x.exp() - x - 1)

    padded, right = liger(batch, loss_type="luspo", **given), ours(batch, config)
    known = (lengths * per_token(batch)).mean()
    assert padded[0].item() == pytest.approx(known.item(), rel=1e-5)
    wanted_value = (per_token(batch) * batch.completion_mask).sum(1).mean()
    assert right[0].item() == pytest.approx(wanted_value.item(), rel=1e-5)
    assert right[0].item() != pytest.approx(padded[0].item(), rel=0.01)
    full = batch._replace(completion_mask=torch.ones_like(batch.completion_mask))
    assert_same(liger(full, loss_type="luspo", **given), ours(full, config))


def test_vespo_weights_at_pads(batch):
    """Deviation: Liger multiplies the weights of pads into the sequence's, so that its caller must
    have set them to 1; masked positions may hold anything here.
    """
    config = LossConfig(**VESPO, **TIS)
    weights = sampling_ratio(batch, config).masked_fill(~batch.completion_mask, 1.3)
    elsewhere = batch.sampler_logps.masked_fill(~batch.completion_mask, -30.0)
    actual = ours(batch._replace(sampler_logps=elsewhere), config)
    assert_same(liger(batch, weights=sampling_ratio(batch, config), loss_type="vespo"), actual)
    theirs = liger(batch, weights=weights, loss_type="vespo")
    assert relative_error(actual[1][0], theirs[1][0]) > 0.01


def test_a_penalty_without_a_reference(batch):
    """Deviation: Liger's KL is 0 then, without a word."""
    hidden, weight, bias = leaves(batch)
    silent = LigerFusedLinearGRPOLoss(beta=0.3, use_ref_model=False, compiled=False)
    _, (kl, _) = silent(
        hidden, weight, batch.completion_ids, batch.completion_mask.float(), batch.advantages, bias,
        old_per_token_logps=batch.old_logps,
    )  # fmt: skip
    assert kl == 0
    with pytest.raises(ValueError, match="ref_logps"):
        ours(batch._replace(ref_logps=None), LossConfig(beta=0.3))


@pytest.mark.parametrize("config", [
    {"surrogate": "cispo_raw", "epsilon_high": 1.2}, {"surrogate": "sapo"},
])  # fmt: skip
def test_sequence_level_that_liger_refuses(config, batch):
    """Deviation: TRL has these two (tests/parity/test_trl.py), and so do we."""
    with pytest.raises(ValueError, match="not supported"):
        liger(batch, loss_type=config["surrogate"].removesuffix("_raw"), **GSPO)
    assert ours(batch, LossConfig(**config, **SEQUENCE))[1][0].norm() > 0
