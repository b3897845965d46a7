"""Advantage estimators without a critic: one entry of `ESTIMATORS` each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.advantages.groups import Groups
from fastgrpo_kernels import GroupStats


class RewardBatch:
    """The input of a formula: sorted rewards, the options, and statistics, computed on demand."""

    def __init__(self, rewards: Tensor, groups: Groups, options: dict[str, Any]) -> None:
        self.rewards = rewards
        self.scored = ~(rewards.isnan() if rewards.dim() == 1 else rewards.isnan().all(1))
        self.groups = groups
        self.options = options
        self.ddof, self.eps, self.lengths = (options[k] for k in ("ddof", "eps", "lengths"))

    @cached_property
    def group(self) -> GroupStats:
        return self.groups.stats(self.rewards)

    @cached_property
    def others(self) -> GroupStats:
        return self.groups.stats(self.rewards, leave_one_out=True)

    def std(self, x: Tensor) -> Tensor:
        """Return the standard deviation of x (B,) over the scored completions of the batch, ()."""
        return _centre(x, self.scored.float(), self.ddof)[1].sqrt()

    def whiten(self, x: Tensor) -> Tensor:
        return whiten(x, self.lengths * self.scored, self.ddof)


class Estimator(NamedTuple):
    """How rewards become advantages."""

    formula: Callable[[RewardBatch], Tensor]
    """Returns the advantages, (B,) fp32; arbitrary for completions that are not scored."""
    uses: tuple[str, ...] = ()
    """The options it reads; setting any other option is an error."""
    needs: tuple[str, ...] = ()
    """The options among them that must be given."""


def _grpo(batch: RewardBatch) -> Tensor:
    return _over(batch.group.gap, batch.group.std(batch.ddof) + batch.eps)


def _grpo_batch(batch: RewardBatch) -> Tensor:
    return _over(batch.group.gap, batch.std(batch.rewards) + batch.eps)


def _grpo_loo(batch: RewardBatch) -> Tensor:
    gap, std = batch.others.gap, batch.others.std(batch.ddof)
    return torch.where(std > 0, gap / (std + batch.eps), gap)


def _grpo_passk(batch: RewardBatch) -> Tensor:
    lead = (batch.rewards - batch.others.high).clamp(min=0)
    return _over(lead, batch.group.std(batch.ddof) + batch.eps)


def _gpg(batch: RewardBatch) -> Tensor:
    rewarded = (batch.scored & (batch.rewards != 0)).sum().clamp(min=1)
    return batch.group.gap * (batch.scored.sum() / rewarded / batch.options["f_norm"])


def _opo(batch: RewardBatch) -> Tensor:
    return batch.groups.stats(batch.rewards, batch.lengths).gap


def _max_rl(batch: RewardBatch) -> Tensor:
    return torch.where(batch.group.mean > 0, batch.group.gap / batch.group.mean, 0.0)


def _remax(batch: RewardBatch) -> Tensor:
    return (batch.rewards - batch.options["greedy_rewards"]).nan_to_num(nan=0.0)


def _gdpo(batch: RewardBatch) -> Tensor:
    rewards = batch.rewards.unbind(1)
    weights = batch.options["reward_weights"] or (1.0,) * len(rewards)
    combined = sum(
        weight * _grpo(RewardBatch(reward, batch.groups, batch.options))
        for weight, reward in zip(weights, rewards, strict=True)
    )
    if batch.lengths is not None:
        return batch.whiten(combined)
    # Over completions the mean is 0: each group's advantages add up to 0.
    return _over(combined, batch.std(combined) + batch.eps)


def _reinforce_plus_plus_baseline(batch: RewardBatch) -> Tensor:
    return batch.whiten(batch.group.gap)


ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator(_grpo, uses=("ddof", "eps")),
    "dr_grpo": Estimator(lambda batch: batch.group.gap),
    "grpo_batch": Estimator(_grpo_batch, uses=("ddof", "eps")),
    "grpo_loo": Estimator(_grpo_loo, uses=("ddof", "eps")),
    "grpo_passk": Estimator(_grpo_passk, uses=("ddof", "eps")),
    "rloo": Estimator(lambda batch: batch.others.gap),
    "gpg": Estimator(_gpg, uses=("f_norm",)),
    "opo": Estimator(_opo, uses=("lengths",), needs=("lengths",)),
    "max_rl": Estimator(_max_rl),
    "remax": Estimator(_remax, uses=("greedy_rewards",), needs=("greedy_rewards",)),
    "gdpo": Estimator(_gdpo, uses=("ddof", "eps", "lengths", "reward_weights")),
    "reinforce_plus_plus_baseline": Estimator(
        _reinforce_plus_plus_baseline, uses=("ddof", "lengths"), needs=("lengths",)
    ),
}


def whiten(x: Tensor, weights: Tensor, ddof: int) -> Tensor:
    """Return (x - mean) / sqrt(variance + 1e-8), weighted; 0 where the weight is 0."""
    centred, variance = _centre(x, weights, ddof)
    return (centred * (variance + 1e-8).rsqrt()).where(weights > 0, 0.0)


def _over(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale, where 0 / 0 is 0: a constant group has neither distances nor a std."""
    return torch.where(x == 0, 0.0, x / scale)


def _centre(x: Tensor, weights: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Return x minus its weighted mean, and the variance about that mean, ().

    x may be anything where the weight is 0. The largest x is subtracted first: the differences are
    exactly 0 if all x are equal, and a large mean costs their sum no digits.
    """
    counted = weights > 0
    largest = torch.where(counted, x, -torch.inf).amax() if x.numel() else 0.0
    x = torch.where(counted, x - largest, 0.0)
    total = weights.sum()
    x = x - (weights * x).sum() / total
    return x, (weights * x.square()).sum() / (total - ddof).clamp(min=1)
