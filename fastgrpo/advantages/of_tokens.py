"""Critic-free advantages of tokens, without groups."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import checks
from fastgrpo.advantages.estimators import whiten
from fastgrpo.advantages.groups import check_ddof, check_rewards
from fastgrpo.checks import finite


def reinforce_plus_plus(
    token_rewards: Tensor,  # (B, T)
    completion_mask: Tensor,  # (B, T) bool
    *,
    gamma: float = 1.0,
    ddof: int = 1,
) -> Tensor:
    """Return the whitened returns of each token, (B, T) fp32 (REINFORCE++, arXiv 2501.03262).

    A token's return is the sum of its reward and of the later ones. A later reward is discounted by
    gamma once for every unmasked token from this one to the one before it. Returns are whitened
    over all unmasked tokens of the batch: (return - mean) / sqrt(variance + 1e-8). There are no
    groups.

    Args:
        token_rewards: (B, T) fp32, such as `token_rewards` of `fastgrpo` minus a KL
            penalty. Masked tokens may hold anything. A completion with NaN at an unmasked token
            counts as unscored: it is left out, and its advantages are 0.
        completion_mask: (B, T) bool. A masked token, such as a tool's, is skipped over: it
            discounts nothing. Its advantage is 0.
        gamma: the discount, in [0, 1].
        ddof: the variance divides by (tokens - ddof).

    If all returns are equal, every advantage is exactly 0.

    Raises:
        ValueError: for a wrong shape, dtype or value.
    """
    checks.tensor("token_rewards", token_rewards)
    if token_rewards.dim() != 2:
        raise ValueError(f"token_rewards: expected shape (B, T), got {tuple(token_rewards.shape)}")
    shape = tuple(token_rewards.shape)
    checks.tensor("completion_mask", completion_mask, shape, token_rewards, (torch.bool,))
    if not 0 <= finite("gamma", gamma) <= 1:
        raise ValueError(f"gamma: expected a number in [0, 1], got {gamma}")
    check_ddof(ddof)
    returns = token_rewards.detach().masked_fill(~completion_mask, 0.0)
    check_rewards("token_rewards", returns, shape)
    counted = completion_mask & ~returns.isnan().any(1, keepdim=True)
    returns = returns.where(counted, 0.0)
    # R[t] = reward[t] + decay[t] * R[t + 1] over spans of 1, 2, 4, ... tokens: log T steps.
    decay = torch.full_like(returns, gamma).where(completion_mask, 1.0)
    span = 1
    while span < shape[1]:
        ahead = (0, span)
        returns = returns + decay * torch.nn.functional.pad(returns[:, span:], ahead)
        decay = decay * torch.nn.functional.pad(decay[:, span:], ahead)
        span *= 2
    return whiten(returns, counted.float(), ddof)
