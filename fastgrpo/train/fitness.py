"""How good a candidate is at a task: the score that evolution climbs."""

from __future__ import annotations

from .model import Policy
from .rollout import generate, texts
from .tasks import Example, Task, score


def mean_reward(policy: Policy, task: Task, examples: list[Example], max_length: int) -> float:
    """Return the mean reward of greedy completions of some prompts; NaN if none could be scored."""
    rollout = generate(policy, [e.prompt for e in examples], max_length, temperature=0.0)
    answers = [e.answer for e in examples]
    return score(task.reward, texts(policy, rollout), answers).nanmean().item()
