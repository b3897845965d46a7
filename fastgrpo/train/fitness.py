"""How good a candidate is at a task: the score that evolution climbs."""

from __future__ import annotations

from .model import Policy
from .rollout import encode, texts
from .sampler import Sampler
from .sampling import Sampling
from .scoring import score
from .tasks import Example, Task


def mean_reward(
    policy: Policy, sampler: Sampler, task: Task, examples: list[Example], max_length: int
) -> float:
    """Return the mean reward of greedy completions of some prompts; NaN if none could be scored."""
    prompts = encode(policy, [e.prompt for e in examples])
    rollout = sampler.sample(prompts, 1, Sampling(max_length, temperature=0.0))
    return score(task, examples, texts(policy, rollout)).rewards.nanmean().item()
