"""Greedy accuracy on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .model import Policy
from .rollout import generate, texts
from .tasks import Task, score


@dataclass(frozen=True)
class Evaluation:
    """The share of held-out prompts solved, and each with its completion and reward."""

    accuracy: float
    samples: list[tuple[str, str, float]]  # prompt, completion, reward


def evaluate(
    policy: Policy, task: Task, batch_size: int, max_length: int, safe_point: Callable[[], None]
) -> Evaluation:
    """Decode greedily for all held-out prompts; ``safe_point`` is called before each batch."""
    correct, samples = 0, []
    for start in range(0, len(task.held_out), batch_size):
        safe_point()
        examples = task.held_out[start : start + batch_size]
        rollout = generate(policy, [e.prompt for e in examples], max_length, temperature=0.0)
        completions, answers = texts(policy, rollout), [e.answer for e in examples]
        correct += sum(map(task.is_correct, completions, answers))
        rewards = score(task.reward, completions, answers).tolist()
        samples += [
            (e.prompt, text, r) for e, text, r in zip(examples, completions, rewards, strict=True)
        ]
    return Evaluation(correct / max(1, len(samples)), samples)
