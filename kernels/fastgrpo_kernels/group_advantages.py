"""Advantages of grouped rewards: each reward against its group's mean and standard deviation."""

from __future__ import annotations

import torch
from torch import Tensor

from .runtime import architecture, device_of, jit, launch_for, tl


@jit
def _group_advantages_kernel(
    rewards_ptr,
    cu_groups_ptr,
    out_ptr,
    ddof,
    eps,
    NORMALIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One group: mean and range, then moments about that mean, then the advantages.

    The second pass also finds what rounding left in the first one's mean, so that the result is
    as accurate as the spread of the rewards, however large their mean.
    """
    group = tl.program_id(0)
    start = tl.load(cu_groups_ptr + group).to(tl.int64)
    end = tl.load(cu_groups_ptr + group + 1).to(tl.int64)
    count = 0.0
    total = 0.0
    low = float("inf")
    high = float("-inf")
    for block in range(start, end, BLOCK_G):
        offs = block + tl.arange(0, BLOCK_G)
        reward = tl.load(rewards_ptr + offs, mask=offs < end, other=float("nan"))
        scored = reward == reward
        count += tl.sum(tl.where(scored, 1.0, 0.0))
        total += tl.sum(tl.where(scored, reward, 0.0))
        low = tl.minimum(low, tl.min(tl.where(scored, reward, float("inf"))))
        high = tl.maximum(high, tl.max(tl.where(scored, reward, float("-inf"))))
    mean = total / tl.maximum(count, 1.0)

    first = 0.0
    second = 0.0
    for block in range(start, end, BLOCK_G):
        offs = block + tl.arange(0, BLOCK_G)
        reward = tl.load(rewards_ptr + offs, mask=offs < end, other=float("nan"))
        gap = tl.where(reward == reward, reward - mean, 0.0)
        first += tl.sum(gap)
        second += tl.sum(gap * gap)
    remainder = first / tl.maximum(count, 1.0)
    scale = 1.0
    if NORMALIZE:
        variance = (second - first * remainder) / tl.maximum(count - ddof, 1.0)
        scale = 1.0 / (tl.sqrt(tl.maximum(variance, 0.0)) + eps)
    # By the range, not by the rounding of a difference: a constant group is exactly 0.
    scale = tl.where(high > low, scale, 0.0)

    for block in range(start, end, BLOCK_G):
        offs = block + tl.arange(0, BLOCK_G)
        reward = tl.load(rewards_ptr + offs, mask=offs < end, other=float("nan"))
        advantage = (reward - mean - remainder) * scale
        tl.store(out_ptr + offs, tl.where(reward == reward, advantage, 0.0), mask=offs < end)


def group_advantages(
    rewards: Tensor,  # (B,) fp32; NaN: not scored
    cu_groups: Tensor,  # (P + 1,) int32 or int64, from 0 to B: groups are contiguous
    normalize: bool,
    ddof: int,
    eps: float,
) -> Tensor:
    """Return (r - mean) / (std + eps), or r - mean, over the scored members of each group.

    (B,) fp32. Exactly 0 for what was not scored, for a constant group and for a group of one.
    """
    out = torch.empty_like(rewards)
    groups = cu_groups.numel() - 1
    launch = launch_for("group_advantages", 0, architecture(rewards.device))
    with device_of(rewards):
        if groups:
            _group_advantages_kernel[(groups,)](
                rewards, cu_groups, out, float(ddof), eps, NORMALIZE=normalize, **launch.kwargs()
            )
    return out
