"""Statistics of each reward's group, from which advantages are computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .runtime import architecture, jit, launch, launch_for, tl


class GroupStats(NamedTuple):
    """Statistics of each row's group, (B,) fp32, over its members.

    Members are the scored rows of the group. With `leave_one_out` the row itself is not a member.
    With weights, rows of weight 0 are not members.
    """

    count: Tensor
    """Number of members, or the sum of their weights."""
    mean: Tensor
    """Mean reward of the members, weighted by the weights; the row's own if there are none."""
    gap: Tensor
    """Reward minus mean. Its error is relative to the spread, however large the mean. Exactly 0
    where the row equals every member, where it is not scored, and where there is no member."""
    square: Tensor
    """Sum of squared distances from the mean: exactly 0 if all members are equal."""
    high: Tensor
    """Largest reward of the members; the row's own if there are none."""

    def std(self, ddof: int) -> Tensor:
        """Return the standard deviation, (B,); the variance divides by count - ddof."""
        return (self.square / (self.count - ddof).clamp(min=1)).sqrt()


@jit
def _load_members(rewards_ptr, weights_ptr, offs, end, row, LEAVE_ONE_OUT: tl.constexpr):
    """Rewards of one block and their weights; both are 0 for rows that are not members."""
    reward = tl.load(rewards_ptr + offs, mask=offs < end, other=float("nan"))
    member = reward == reward
    if LEAVE_ONE_OUT:
        member = member & (offs != row)
    weight = tl.where(member, 1.0, 0.0)
    if weights_ptr is not None:
        weight *= tl.load(weights_ptr + offs, mask=offs < end, other=0.0)
    return tl.where(member, reward, 0.0), weight


@jit
def _group_stats_kernel(
    # inputs: (B,) fp32, (B,) fp32 or None, (B,) int64, (P + 1,) int32 or int64
    rewards_ptr,
    weights_ptr,
    groups_ptr,
    cu_groups_ptr,
    # output: (5, B) fp32, the fields of GroupStats
    stats_ptr,
    B,
    LEAVE_ONE_OUT: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One row: range and mean of its group, then moments about that mean.

    The second pass also measures the rounding error of the first pass's mean. So the error of the
    result is relative to the spread of the rewards, however large their mean.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.load(groups_ptr + row)
    start = tl.load(cu_groups_ptr + group).to(tl.int64)
    end = tl.load(cu_groups_ptr + group + 1).to(tl.int64)
    own = tl.load(rewards_ptr + row)
    scored = own == own
    own = tl.where(scored, own, 0.0)

    count = 0.0
    total = 0.0
    low = float("inf")
    high = float("-inf")
    for block in range(start, end, BLOCK_G):
        offs = block + tl.arange(0, BLOCK_G)
        reward, weight = _load_members(rewards_ptr, weights_ptr, offs, end, row, LEAVE_ONE_OUT)
        count += tl.sum(weight)
        total += tl.sum(weight * reward)
        low = tl.minimum(low, tl.min(tl.where(weight > 0, reward, float("inf"))))
        high = tl.maximum(high, tl.max(tl.where(weight > 0, reward, float("-inf"))))
    divisor = tl.where(count > 0, count, 1.0)
    # If all rewards are equal, their mean is exactly that reward, not a rounded sum.
    mean = tl.where(high > low, total / divisor, tl.where(count > 0, low, own))

    first = 0.0
    second = 0.0
    for block in range(start, end, BLOCK_G):
        offs = block + tl.arange(0, BLOCK_G)
        reward, weight = _load_members(rewards_ptr, weights_ptr, offs, end, row, LEAVE_ONE_OUT)
        distance = reward - mean
        first += tl.sum(weight * distance)
        second += tl.sum(weight * distance * distance)
    remainder = first / divisor

    stats_ptr += row
    tl.store(stats_ptr, count)
    tl.store(stats_ptr + B, mean + remainder)
    tl.store(stats_ptr + 2 * B, tl.where(scored, (own - mean) - remainder, 0.0))
    tl.store(stats_ptr + 3 * B, tl.maximum(second - first * remainder, 0.0))
    tl.store(stats_ptr + 4 * B, tl.where(count > 0, high, own))


def group_stats(
    rewards: Tensor,  # (B,) fp32; NaN: not scored
    cu_groups: Tensor,  # (P + 1,) int32 or int64, from 0 to B: groups are contiguous
    weights: Tensor | None = None,  # (B,) fp32 >= 0; None: 1
    leave_one_out: bool = False,
) -> GroupStats:
    """Return the statistics of each row's group, with or without the row itself."""
    rows = rewards.numel()
    stats = rewards.new_empty(len(GroupStats._fields), rows)
    lengths = cu_groups.diff()
    groups = torch.arange(len(lengths), device=rewards.device).repeat_interleave(
        lengths, output_size=rows
    )
    launch(
        _group_stats_kernel,
        (rows,),
        launch_for("group_advantages", 0, architecture(rewards.device)),
        rewards.device,
        rewards_ptr=rewards,
        weights_ptr=weights,
        groups_ptr=groups,
        cu_groups_ptr=cu_groups,
        stats_ptr=stats,
        B=rows,
        LEAVE_ONE_OUT=leave_one_out,
    )
    return GroupStats(*stats)
