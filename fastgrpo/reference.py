"""The specification: full logits, plain autograd, one formula per line. Slow and obvious.

In float64 this is the oracle that everything else is compared with. In float32 it stands for "the
same formula in plain PyTorch". Only tests and benchmarks import it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgrpo.objective.config import LossConfig
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS, KL_GRADIENTS


def logits(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (...)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the logits (..., V), in the dtype of the inputs."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)


def token_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (...)
    *,
    kept: Tensor | None = None,  # (..., V) bool: what the sampler could have drawn
    **transform: Any,  # as `logits` takes it
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logps, entropy and lse, each (...), in the dtype of the inputs."""
    z = logits(hidden, weight, **transform)
    if kept is not None:
        z = z.masked_fill(~kept, -torch.inf)
    logp = z.log_softmax(-1)
    return logp.gather(-1, token_ids[..., None])[..., 0], _entropy(logp), z.logsumexp(-1)


def selected_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    selected_ids: Tensor,  # (..., K)
    **transform: Any,  # as `logits` takes it
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logps (..., K), and lse, entropy and the sum of squared probabilities (...)."""
    z = logits(hidden, weight, **transform)
    logp = z.log_softmax(-1)
    squares = (2 * logp).exp().sum(-1)
    return logp.gather(-1, selected_ids), z.logsumexp(-1), _entropy(logp), squares


def _entropy(logp: Tensor) -> Tensor:
    # Where p is 0, p log p is: its autograd would be 0 * inf.
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def policy_loss(
    logps: Tensor,  # (B, T)
    entropy: Tensor | None,  # (B, T)
    mask: Tensor,  # (B, T) bool
    advantages: Tensor,  # (B,) or (B, T)
    config: LossConfig,
    *,
    old_logps: Tensor | None = None,  # (B, T)
    ref_logps: Tensor | None = None,  # (B, T)
    sampler_logps: Tensor | None = None,  # (B, T), NaN where unknown
    groups: Tensor | None = None,  # (B,)
    normalizer: float | None = None,
) -> Tensor:
    """Return the loss of a padded batch, ()."""
    batch = _Padded(mask)
    logps = batch.clean(logps)
    detached = logps.detach()
    old = detached if old_logps is None else batch.clean(old_logps)
    known = None if sampler_logps is None else batch.clean(sampler_logps)
    advantages = advantages[:, None].expand_as(logps) if advantages.dim() == 1 else advantages
    advantages = batch.clean(advantages)

    anchor = old
    if config.anchor == "sampler" and known is not None:
        anchor = torch.where(known.isnan(), detached, known)
    token_ratio = torch.zeros_like(logps) if config.ratio_level == "none" else logps - anchor
    if config.log_ratio_clamp is not None:
        token_ratio = token_ratio.clamp(-config.log_ratio_clamp, config.log_ratio_clamp)
    if config.surrogate == "gmpo":
        clipped = token_ratio.clamp(-config.epsilon_low, config.epsilon_high)
        above, below = torch.minimum(token_ratio, clipped), torch.maximum(token_ratio, clipped)
        token_ratio = torch.where(advantages > 0, above, below)
    log_ratio = token_ratio
    if config.ratio_level == "sequence":
        log_ratio = batch.mean(token_ratio)
    elif config.ratio_level == "sequence_token":
        log_ratio = token_ratio - token_ratio.detach() + batch.mean(token_ratio).detach()
    elif config.ratio_level == "sequence_sum":
        log_ratio = batch.sum(token_ratio)

    correction = torch.ones_like(logps)
    multiplier = torch.ones_like(logps)
    if config.needs_sampler:
        log_w = torch.where(known.isnan(), 0.0, old - known)
        correction = _correction(batch, log_w, config)
        multiplier = multiplier * _kept(batch, log_w, config)
    if not config.folds_correction:
        multiplier = multiplier * correction
    if config.off_policy_mask_threshold is not None:
        gap = (old if known is None else known) - detached
        far = batch.mean(gap.nan_to_num(nan=0.0)) > config.off_policy_mask_threshold
        multiplier = multiplier * ~(far & (advantages < 0))
    selected = torch.ones_like(logps)
    if config.top_entropy_quantile < 1:
        threshold = entropy[mask].quantile(1 - config.top_entropy_quantile)
        selected = (entropy >= threshold).to(logps.dtype).detach()

    context = _context(batch, config, logps, token_ratio, advantages, correction)
    loss = config.rule.formula(logps, log_ratio, advantages, context, *config.parameters)
    loss = loss * multiplier * selected
    if config.beta:
        x = batch.clean(ref_logps) - logps
        loss = loss + config.beta * _kl(x, logps, torch.exp(log_ratio), config)
    if config.entropy_coef:
        loss = loss - config.entropy_coef * batch.clean(entropy) * selected
    return _aggregate(batch, loss, config, groups, normalizer)


def _kl(x: Tensor, logps: Tensor, ratio: Tensor, config: LossConfig) -> Tensor:
    bound, limit = (b or math.inf for b in (config.kl_input_clamp, config.kl_output_clamp))
    gradient = KL_GRADIENTS[config.kl_gradient].formula
    estimate = KL_ESTIMATORS[config.kl].formula(x.clamp(-bound, bound))
    if config.kl_gradient == "score_function":
        # NeMo-RL: where the input clamp holds the estimate, the weight has no gradient either. The
        # output clamp applies to the product of weight and estimate.
        logps = torch.where(x.abs() <= bound, logps, logps.detach())
        return gradient(x, logps, estimate, ratio).clamp(-limit, limit)
    return gradient(x, logps, estimate.clamp(-limit, limit), ratio)


class _Padded:
    """Sums and means over the unmasked tokens of each sequence, (B, T) to (B, T)."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.lengths = mask.sum(1, keepdim=True).clamp(min=1)

    def clean(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0.0)

    def sum(self, x: Tensor) -> Tensor:
        return self.clean(x).sum(1, keepdim=True).expand_as(x)

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.lengths

    def max(self, x: Tensor) -> Tensor:
        lowest = x.masked_fill(~self.mask, -math.inf)
        return lowest.amax(1, keepdim=True).expand_as(x) if x.shape[1] else x


def _correction(batch: _Padded, log_w: Tensor, config: LossConfig) -> Tensor:
    low, high = config.correction_bounds
    token, sequence = log_w.exp(), batch.sum(log_w).exp()
    geometric = batch.mean(log_w).exp()
    return {
        "none": torch.ones_like(log_w),
        "token_tis": token.clamp(low, high),
        "sequence_tis": sequence.clamp(low, high),
        "icepop": token * ((token >= low) & (token <= high)),
        "sequence_mis": sequence * ((sequence >= low) & (sequence <= high)),
        "seq_mask_tis": token * ((geometric >= low) & (geometric <= high)),
    }[config.correction]


def _kept(batch: _Padded, log_w: Tensor, config: LossConfig) -> Tensor:
    if config.rejection == "none":
        return torch.ones_like(log_w)
    level, k = config.rejection.rsplit("_", 1)
    estimate = KL_ESTIMATORS[k].formula(log_w.clamp(-20, 20))
    over = {"token": lambda x: x, "seq_sum": batch.sum, "seq_mean": batch.mean,
            "seq_max": batch.max}[level](estimate)  # fmt: skip
    low, high = config.rejection_bounds
    if k == "k1":
        return (over.exp() >= low) & (over.exp() <= high)
    return over <= high


def _context(
    batch: _Padded,
    config: LossConfig,
    logps: Tensor,
    token_ratio: Tensor,
    advantages: Tensor,
    correction: Tensor,
) -> Tensor:
    """Return the surrogate's context (B, T): a constant per token, from its sequence or batch."""
    mask = batch.mask
    logps, token_ratio = logps.detach(), token_ratio.detach()
    context, ratio = torch.zeros_like(logps), token_ratio.exp()
    if config.surrogate in ("clip_cov", "kl_cov"):
        covariance = (advantages - advantages[mask].mean()) * (logps - logps[mask].mean())
        if config.surrogate == "kl_cov":
            largest = covariance[mask].sort(descending=True).values
            return covariance >= largest[max(1, int(config.cov_ratio * len(largest))) - 1]
        assert config.cov_ratio == 1, "which tokens are drawn is random"
        bounded = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
        clipped = bounded * advantages < ratio * advantages
        inside = (covariance > config.cov_low) & (covariance < config.cov_high)
        return (clipped | ~inside).to(logps.dtype)
    if config.surrogate == "fipo":
        gamma = 2 ** (-1 / config.fipo_half_life)
        counted = mask & (ratio <= (config.delta or math.inf))
        for b, t in mask.nonzero().tolist():
            # Distances count unmasked tokens only.
            later = [u for u in range(t, mask.shape[1]) if mask[b, u]]
            moved = [
                gamma**distance * token_ratio[b, u].item() * counted[b, u].item()
                for distance, u in enumerate(later)
            ]
            context[b, t] = math.exp(sum(moved))
        context = context.clamp(config.fipo_low, config.fipo_high)
        risky = (advantages < 0) & (ratio > (config.fipo_safety_ratio or math.inf))
        return torch.where(risky, context.clamp(0.8, 1.0), context)
    if config.surrogate == "vespo":
        return batch.sum(token_ratio + correction.log().clamp(math.log(1e-8), 20))
    return context


def _aggregate(
    batch: _Padded,
    loss: Tensor,
    config: LossConfig,
    groups: Tensor | None,
    normalizer: float | None,
) -> Tensor:
    loss, lengths = batch.clean(loss), batch.mask.sum(1)
    sequences = max(len(loss), 1)
    if config.aggregation == "prompt_mean":
        prompts = [groups == g for g in groups.unique()]
        means = [loss[p].sum() / lengths[p].sum().clamp(min=1) for p in prompts]
        return sum(means, start=loss.sum() * 0) / (normalizer or max(len(prompts), 1))
    if config.aggregation == "sequence_mean":
        loss = loss / batch.lengths
    denominator = {
        "token_mean": lengths.sum().clamp(min=1),
        "sequence_mean": sequences,
        "fixed_length": sequences * (config.max_completion_length or 1),
        "token_sum": 1,
        "sequence_sum": sequences,
    }[config.aggregation]
    return loss.sum() / (normalizer or denominator)
