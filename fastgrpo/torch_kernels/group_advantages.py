"""Statistics of each reward's group, from which advantages are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo_kernels import GroupStats


def group_stats(
    rewards: Tensor,  # (B,) fp32
    cu_groups: Tensor,  # (P + 1,)
    weights: Tensor | None = None,  # (B,)
    leave_one_out: bool = False,
) -> GroupStats:
    """Return the statistics of each row's group, with or without the row itself.

    Computed in fp64, so that a row can be subtracted from the sums of its group.
    """
    lengths = cu_groups.diff()
    group = torch.repeat_interleave(lengths, output_size=rewards.shape[0])
    scored = ~rewards.isnan()
    reward = torch.where(scored, rewards, 0.0).double()
    weight = scored.double() if weights is None else scored * weights.double()

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(lengths.shape).index_add_(0, group, x)[group]

    def largest(x: Tensor) -> Tensor:
        return x.new_full(lengths.shape, -torch.inf).scatter_reduce_(0, group, x, "amax")[group]

    def moments(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        member = weight > 0
        low = -largest(torch.where(member, -reward, -torch.inf))
        high = largest(torch.where(member, reward, -torch.inf))
        count = total(weight)
        mean = torch.where(high > low, total(weight * reward) / count, low)
        distance = torch.where(member, reward - mean, 0.0)
        return count, mean, total(weight * distance.square()), low, high

    stats = moments(weight)
    if leave_one_out:
        count, mean, square, low, high = stats
        gap = torch.where(weight > 0, reward - mean, 0.0)
        share = torch.where(weight > 0, weight / (count - weight), 0.0)
        square = square - weight * gap.square() * (1 + share)
        stats = count - weight, mean - gap * share, square, low, high
        # Subtracting the only highest or lowest reward may cancel a sum: sum again without it.
        for extreme in (low, high):
            alone = (reward == extreme) & (weight > 0)
            alone &= total(alone.double()) == 1
            rest = moments(weight.masked_fill(alone, 0.0))
            stats = [torch.where(alone, r, s) for r, s in zip(rest, stats, strict=True)]
    count, mean, square, _, high = stats
    mean, high = (torch.where(count > 0, x, reward) for x in (mean, high))
    gap = torch.where(scored, reward - mean, 0.0)
    return GroupStats(*(x.float() for x in (count, mean, gap, square, high)))
