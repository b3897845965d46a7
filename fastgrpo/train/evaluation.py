"""Greedy completions of held-out prompts: how many are right, and their rewards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .model import Policy
from .rollout import generate, texts
from .scoring import right, score
from .tasks import Task


@dataclass(frozen=True)
class Evaluation:
    """Held-out prompts with their completions and rewards, and the share that is right."""

    accuracy: float | None  # None where the task does not say what is right
    samples: list[tuple[str, str, float]]  # prompt, completion, reward

    @property
    def reward(self) -> float:
        """The mean reward of the completions that could be scored; NaN if none could."""
        known = [reward for *_, reward in self.samples if not math.isnan(reward)]
        return math.fsum(known) / len(known) if known else math.nan

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f"accuracy {self.accuracy:.3f}, "
        return f"{accuracy}reward {self.reward:.3f}"


def evaluate(
    policy: Policy, task: Task, batch_size: int, max_length: int, safe_point: Callable[[], None]
) -> Evaluation:
    """Decode greedily for all held-out prompts; ``safe_point`` is called before each batch."""
    correct: list[bool] = []
    samples = []
    for start in range(0, len(task.held_out), batch_size):
        safe_point()
        examples = task.held_out[start : start + batch_size]
        rollout = generate(policy, [e.prompt for e in examples], max_length, temperature=0.0)
        completions = texts(policy, rollout)
        if task.accuracy is not None:
            correct += right(task, examples, completions)
        rewards = score(task, examples, completions).rewards.tolist()
        samples += [
            (e.prompt, text, r) for e, text, r in zip(examples, completions, rewards, strict=True)
        ]
    accuracy = None if task.accuracy is None else sum(correct) / max(1, len(samples))
    return Evaluation(accuracy, samples)
