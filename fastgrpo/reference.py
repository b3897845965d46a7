"""The specification: full logits, plain autograd, one formula per line. Slow and obvious.

In float64 this is the oracle that everything else is held against; in float32 it is what "the same
formula in plain PyTorch" gives. Only tests and benchmarks import it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.config import LossConfig
from fastgrpo_kernels.surrogates import KL_ESTIMATORS, SURROGATES


def token_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (...)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logps, entropy and lse, each (...), in the dtype of the inputs."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    logp = z.log_softmax(-1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    return logp.gather(-1, token_ids[..., None])[..., 0], entropy, z.logsumexp(-1)


def policy_loss(
    logps: Tensor,  # (B, T)
    entropy: Tensor | None,  # (B, T)
    mask: Tensor,  # (B, T) bool
    advantages: Tensor,  # (B,) or (B, T)
    config: LossConfig,
    *,
    old_logps: Tensor | None = None,  # (B, T)
    ref_logps: Tensor | None = None,  # (B, T)
    normalizer: float | None = None,
) -> Tensor:
    """Return the loss of a padded batch, ()."""
    m = mask.to(logps.dtype)
    lengths = m.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    logps = torch.where(mask, logps, 0.0)
    old_logps = logps.detach() if old_logps is None else torch.where(mask, old_logps, 0.0)
    log_ratio = logps - old_logps
    if config.ratio_level == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(logps)
    advantages = advantages[:, None].expand_as(logps) if advantages.dim() == 1 else advantages
    advantages = torch.where(mask, advantages, 0.0)
    loss = SURROGATES[config.surrogate].formula(
        logps, log_ratio, advantages, config.epsilon_low, config.epsilon_high, config.delta or 0.0
    )
    if config.beta:
        to_reference = torch.where(mask, ref_logps, 0.0) - logps
        loss = loss + config.beta * KL_ESTIMATORS[config.kl].formula(to_reference)
    if config.entropy_coef:
        loss = loss - config.entropy_coef * torch.where(mask, entropy, 0.0)
    if config.aggregation == "token_mean":
        return (loss * m).sum() / (normalizer or m.sum().clamp(min=1))
    if config.aggregation == "sequence_mean":
        return ((loss * m).sum(1) / lengths[:, 0]).sum() / (normalizer or max(len(m), 1))
    return (loss * m).sum() / (normalizer or len(m) * config.max_completion_length)


def group_advantages(rewards: list[float], ids: list[int], normalize: bool = True) -> list[float]:
    """Return (r - mean) / (std + 1e-4) within each group, in Python floats."""
    result = []
    for reward, group in zip(rewards, ids, strict=True):
        scored = [r for r, g in zip(rewards, ids, strict=True) if g == group and r == r]
        if reward != reward or len(scored) < 2:
            result.append(0.0)
            continue
        mean = sum(scored) / len(scored)
        std = (sum((r - mean) ** 2 for r in scored) / (len(scored) - 1)) ** 0.5
        result.append((reward - mean) / (std + 1e-4 if normalize else 1.0))
    return result
