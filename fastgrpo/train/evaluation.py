"""Greedy completions of held-out prompts: how many are right, and their rewards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from . import ranks
from .model import Policy
from .rollout import encode, texts
from .sampler import Sampler
from .sampling import Sampling
from .scoring import right, score
from .tasks import Task

Item = TypeVar("Item")


@dataclass(frozen=True)
class Evaluation:
    """Held-out prompts with their completions and rewards, and the share that is right."""

    accuracy: float | None  # None where the task does not say what is right
    samples: list[tuple[str, str, float]]  # prompt, completion, reward
    seconds: float

    @property
    def reward(self) -> float:
        """The mean reward of the completions that could be scored; NaN if none could."""
        known = [reward for *_, reward in self.samples if not math.isnan(reward)]
        return math.fsum(known) / len(known) if known else math.nan

    def metrics(self) -> dict[str, float]:
        """Return what the step's line gets."""
        found = {"eval_reward": self.reward, "eval_seconds": self.seconds}
        return found if self.accuracy is None else found | {"accuracy": self.accuracy}

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f"accuracy {self.accuracy:.3f}, "
        return f"{accuracy}reward {self.reward:.3f}"


def evaluate(
    policy: Policy,
    sampler: Sampler,
    task: Task,
    batch_size: int,
    max_length: int,
    safe_point: Callable[[], None],
) -> Evaluation:
    """Decode greedily for all held-out prompts.

    A batch has the tokens that ``batch_size`` completions of the longest prompt may have; of
    shorter prompts it takes more. ``safe_point`` is called before each batch. Each of several
    processes takes its part of the prompts, and all get the whole.
    """
    start = time.perf_counter()
    held_out = ranks.part(task.held_out)
    encoded = encode(policy, [e.prompt for e in held_out])
    completions = [""] * len(encoded)
    for chosen in _batches([len(prompt) + max_length for prompt in encoded], batch_size):
        safe_point()
        prompts = [encoded[i] for i in chosen]
        rollout = sampler.sample(prompts, 1, Sampling(max_length, temperature=0.0))
        for i, text in zip(chosen, texts(policy, rollout), strict=True):
            completions[i] = text
    rewards = score(task, held_out, completions).rewards.tolist()
    prompts = [e.prompt for e in held_out]
    samples = _all_of(list(zip(prompts, completions, rewards, strict=True)))
    accuracy = None
    if task.accuracy is not None:
        judged = _all_of(right(task, held_out, completions))
        accuracy = sum(judged) / max(1, len(judged))
    return Evaluation(accuracy, samples, time.perf_counter() - start)


def _all_of(own: list[Item]) -> list[Item]:
    """Return the items of all processes."""
    return [item for part in ranks.gathered(own) for item in part]


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield indices, longest first; no batch has more than ``size`` times the longest length."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    budget = size * max(lengths, default=0)
    while order:
        count = max(1, budget // lengths[order[0]])
        yield order[:count]
        order = order[count:]
