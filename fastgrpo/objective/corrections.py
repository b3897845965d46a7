"""What the gap between trainer and sampler does to the policy loss: weights and rejections.

With w = exp(old_logps - sampler_logps), the trainer's probability of a token at rollout time over
the inference engine's. A token that the engine could not score (NaN) counts as w = 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import checks
from fastgrpo.backend import Kernels
from fastgrpo.checks import one_of
from fastgrpo.dispatch import choice
from fastgrpo.objective.config import LossConfig
from fastgrpo.objective.fields import REJECTIONS
from fastgrpo.objective.segments import Segments, Sequences
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS
from fastgrpo_kernels.twins import torch_twin


class SamplerWeights(NamedTuple):
    """Constants of the policy loss, (n,) each."""

    weights: Tensor  # the correction's
    truncated: Tensor  # bool: where it is not w itself
    kept: Tensor  # bool: not rejected

    def __getitem__(self, index: slice | Tensor) -> SamplerWeights:  # type: ignore[override]
        return SamplerWeights(*(x[index] for x in self))

    def multipliers(self) -> Tensor:
        return self.weights * self.kept


def sampler_gap(old_logps: Tensor, sampler_logps: Tensor) -> Tensor:
    """Return log w (n,), 0 where the sampler has no log-prob."""
    return torch.where(sampler_logps.isnan(), 0.0, old_logps - sampler_logps)


def sampler_weights(config: LossConfig, log_w: Tensor, segments: Segments | None) -> SamplerWeights:
    """Return what `config.correction` and `config.rejection` make of log w (n,)."""
    weights, truncated = _correction(config, log_w, segments)
    kept = torch.ones_like(truncated)
    if config.rejection != "none":
        kept = keep(config.rejection, config.rejection_bounds, log_w, segments)
    return SamplerWeights(weights, truncated, kept)


def _correction(
    config: LossConfig, log_w: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    low, high = config.correction_bounds
    if config.correction == "none":
        return torch.ones_like(log_w), torch.zeros_like(log_w, dtype=torch.bool)
    if config.correction in ("sequence_tis", "sequence_mis"):
        log_w = segments.sum(log_w)
    w = _exp(log_w)
    judged = _exp(segments.mean(log_w)) if config.correction == "seq_mask_tis" else w
    outside = (judged < low) | (judged > high)
    if config.correction.endswith("_tis") and config.correction != "seq_mask_tis":
        return w.clamp(low, high), outside
    return torch.where(outside, 0.0, w), outside


def keep(
    rejection: str, bounds: tuple[float, float], log_w: Tensor, segments: Segments | None
) -> Tensor:
    """Return where (n,) the divergence between trainer and sampler is within its bounds."""
    level, k = rejection.rsplit("_", 1)
    divergence, _ = torch_twin(KL_ESTIMATORS[k].fn)(log_w.clamp(-20, 20))
    if level == "seq_sum":
        divergence = segments.sum(divergence)
    elif level == "seq_mean":
        divergence = segments.mean(divergence)
    elif level == "seq_max":
        divergence = segments.max(divergence)
    low, high = (math.log(b) for b in bounds) if k == "k1" else bounds
    return (divergence >= low) & (divergence <= high)


def rejection_mask(
    old_logps: Tensor,  # (B, T)
    sampler_logps: Tensor,  # (B, T)
    completion_mask: Tensor,  # (B, T) bool
    rejection: str,
    *,
    rejection_max: float,
    rejection_min: float | None = None,
) -> Tensor:
    """Return completion_mask without the tokens or sequences too far from the sampler, (B, T) bool.

    Pass the result as `completion_mask`: what is rejected then leaves the denominator and the KL as
    well, as in verl. `LossConfig.rejection` drops the policy loss alone. For several rules, call
    this several times.

    Args:
        old_logps, sampler_logps: nats; anything where masked; a NaN of the sampler counts as equal.
        rejection: level and divergence. "token_k1" to "token_k3" decide for each token;
            "seq_sum_", "seq_mean_" and "seq_max_" for its sequence. With
            x = old_logps - sampler_logps, bounded to +-20: k1 = -x, k2 = x^2 / 2,
            k3 = exp(x) - 1 - x.
        rejection_max: upper bound of the divergence; for k1, of exp(k1).
        rejection_min: lower bound of exp(k1), for k1 only. None = 1 / rejection_max.

    Raises:
        ValueError: for a wrong shape, dtype or value, and for rejection_min without k1.
    """
    one_of("rejection", rejection, REJECTIONS[1:])
    config = LossConfig(
        rejection=rejection, rejection_min=rejection_min, rejection_max=rejection_max
    )
    checks.tensor("completion_mask", completion_mask, dtypes=(torch.bool,))
    shape = tuple(completion_mask.shape)
    if len(shape) != 2:
        raise ValueError(f"completion_mask: expected shape (B, T), got {shape}")
    for name, x in (("old_logps", old_logps), ("sampler_logps", sampler_logps)):
        checks.tensor(name, x, shape, completion_mask, checks.FLOATS)
    cu = torch.arange(shape[0] + 1, device=completion_mask.device) * shape[1]
    owner = Sequences.of(cu, completion_mask.flatten())
    log_w = sampler_gap(old_logps.float(), sampler_logps.float()).masked_fill(~completion_mask, 0.0)

    def kept(kernels: Kernels) -> Tensor:
        segments = owner.all_segments(kernels)
        return keep(rejection, config.rejection_bounds, log_w.flatten(), segments)

    return completion_mask & choice.run(kept, "auto", log_w).view(shape)


def _exp(x: Tensor) -> Tensor:
    return x.clamp(max=80).exp()
