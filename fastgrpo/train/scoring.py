"""Completions to rewards: float64 until they are advantages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reward_process import STARTING, RewardEnded, RewardLost, RewardTimeout
from .rewards import RewardFunction, WrongResult, accepted, numbers_of
from .tasks import Example, Task

LARGEST_REWARD = 1e14  # differences stay below the 1e15 that group_advantages takes
# Completions of a step for which a reward may hang, or end its process one after the other, before
# the rest is left out.
PATIENCE = 3
ROUNDING = 1e-12  # of the largest reward: differences of sums in float64 that mean nothing


@dataclass(frozen=True)
class Scores:
    """Rewards of S completions: their weighted sum, and each for itself.

    NaN in ``rewards`` marks a completion that could not be scored, NaN in ``by_reward`` also one to
    which that reward does not apply.
    """

    rewards: Tensor  # (S,) float64
    by_reward: dict[str, Tensor]  # (S,) float64 each

    def __getitem__(self, chosen: Tensor) -> Scores:
        """Return the scores of the completions at ``chosen``, (K,) int64 or (S,) bool."""
        picked = {name: values[chosen] for name, values in self.by_reward.items()}
        return Scores(self.rewards[chosen], picked)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Return the scores of several batches of one task, one after the other."""
        return cls(
            torch.cat([part.rewards for part in parts]),
            {k: torch.cat([part.by_reward[k] for part in parts]) for k in parts[0].by_reward},
        )

    def metrics(self) -> dict[str, float]:
        """Return means and standard deviations (n - 1), under TRL's names."""
        means = {"reward": _mean(self.rewards), "reward_std": _std(self.rewards)}
        for name, values in self.by_reward.items():
            means |= {f"rewards/{name}/mean": _mean(values), f"rewards/{name}/std": _std(values)}
        return means | {"unscorable": self.rewards.isnan().sum().item()}


def score(task: Task, examples: Sequence[Example], completions: Sequence[str]) -> Scores:
    """Return the rewards of one completion for each example.

    The sum leaves out rewards that are None for a completion. A completion cannot be scored if a
    reward raises, is NaN or beyond 1e14 for it, or if all are None. Raises ValueError for a reward
    that takes what the data have not, or returns anything but one number for each completion.
    """
    given = _given(task, examples, completions)
    total = torch.zeros(len(examples), dtype=torch.float64)
    applies, broken = torch.zeros(len(examples), dtype=torch.bool), total.isnan()
    by_reward = {}
    for reward in task.rewards:
        values = _ask(reward.name, reward.function, given, len(examples))
        none = torch.tensor([value is None for value in values], dtype=torch.bool)
        numbers = torch.tensor([0.0 if v is None else v for v in values], dtype=torch.float64)
        foreign = numbers.isnan() | _too_large(f"reward {reward.name}", numbers)
        broken |= foreign
        applies |= ~none
        total += reward.weight * numbers.masked_fill(foreign, 0.0)
        by_reward[reward.name] = numbers.masked_fill(none | foreign, math.nan)
    broken |= _too_large("the weighted sum of rewards", total)
    return Scores(total.masked_fill(broken | ~applies, math.nan), by_reward)


def longest(rewards: int, limit: float) -> float:
    """Return for how many seconds a step or an evaluation may wait for rewards that all hang.

    ``limit`` is that of a call. Each hangs for a batch, and then for some completions alone; the
    evaluation asks one of them for the accuracy too.
    """
    return (rewards + 1) * (1 + PATIENCE) * (STARTING + limit)


def right(task: Task, examples: Sequence[Example], completions: Sequence[str]) -> list[bool]:
    """Return which completions count as right; none that cannot be judged does."""
    given = _given(task, examples, completions)
    values = _ask("accuracy", task.accuracy.function, given, len(examples))
    return [value is not None and value >= task.accuracy.threshold for value in values]


def check_rewards(task: Task) -> None:
    """Raise ValueError for a reward that takes a column that no example has."""
    given = dict.fromkeys(("prompts", "completions", *task.columns))
    for reward in task.rewards:
        accepted(reward.name, reward.function, given)


def centred(rewards: Tensor, group_size: int) -> Tensor:
    """Return rewards (S,) float64 less the mean of their group, as fp32; NaN stays NaN.

    Advantages that compare with the group's mean are the same, and rewards of 10^9 that differ by 1
    keep their difference.
    """
    groups = rewards.view(-1, group_size)
    apart = groups - groups.nanmean(dim=1, keepdim=True)
    rounding = ROUNDING * groups.abs().nan_to_num(0.0).amax(dim=1, keepdim=True)
    return apart.where((apart.abs() > rounding) | apart.isnan(), 0.0).flatten().float()


def _given(
    task: Task, examples: Sequence[Example], completions: Sequence[str]
) -> dict[str, list[Any]]:
    """Return what a reward may take, by its name: also columns that none of the examples has."""
    columns: dict[str, list[Any]] = {
        name: [e.columns.get(name, e.answer if name == "answer" else None) for e in examples]
        for name in task.columns
    }
    return columns | {
        "prompts": [e.prompt if e.messages is None else [*e.messages] for e in examples],
        "completions": [
            text if e.messages is None else [{"role": "assistant", "content": text}]
            for e, text in zip(examples, completions, strict=True)
        ],
    }


def _ask(
    name: str, function: RewardFunction, given: Mapping[str, list[Any]], count: int
) -> list[float | None]:
    """Return the function's values; where it raises, it is asked again for each one alone."""
    if not count:
        return []
    taken = accepted(name, function, given)
    try:
        return _numbers(name, function(**taken), count)
    except (WrongResult, RewardLost):
        raise
    except Exception:  # the user's code: one bad completion must not end a long run
        values, errors, hung, ended = [], [], 0, 0
        for i in range(count):
            try:
                alone = {key: value[i : i + 1] for key, value in taken.items()}
                values += _numbers(name, function(**alone), 1)
                ended = 0
            except (WrongResult, RewardLost):
                raise
            except Exception as error:
                errors.append(error)
                values.append(math.nan)
                hung += isinstance(error, RewardTimeout)
                ended = ended + 1 if isinstance(error, RewardEnded) else 0
            if PATIENCE in (hung, ended):
                missing = count - len(values)
                errors += errors[-1:] * missing
                values += [math.nan] * missing
                break
        if errors:
            warnings.warn(
                f"reward {name} raised {errors[0]!r:.200} for {len(errors)} of {count} "
                "completions, which are unscorable",
                stacklevel=3,
            )
        return values


def _numbers(name: str, result: object, count: int) -> list[float | None]:
    values = numbers_of(name, result)
    if len(values) != count:
        raise WrongResult(f"reward {name}: expected {count} numbers, got {len(values)}")
    return values


def _too_large(name: str, numbers: Tensor) -> Tensor:
    """Return which numbers are beyond LARGEST_REWARD, and say so if there are any."""
    beyond = numbers.abs() > LARGEST_REWARD
    if beyond.any():
        warnings.warn(
            f"{name}: expected at most {LARGEST_REWARD:g} in magnitude, got "
            f"{numbers[beyond][0]:g}; {beyond.sum()} of {len(numbers)} completions are unscorable",
            stacklevel=3,
        )
    return beyond


def _mean(values: Tensor) -> float:
    return values.nanmean().item()


def _std(values: Tensor) -> float:
    """Return the standard deviation of what is not NaN; 0 of a single value."""
    known = values[~values.isnan()]
    return known.std().item() if len(known) > 1 else math.nan if not len(known) else 0.0
