"""A warning when nothing can be learnt: every advantage has been 0 for several steps."""

from __future__ import annotations

import warnings

from . import ranks
from .completions import Rollout

STEPS = 5


class Stalled:
    """Counts steps without any advantage in all processes; warns at the fifth in a row why."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    def watch(self, rollout: Rollout) -> None:
        """Take note of a step's rewards and advantages."""
        live = any(ranks.gathered(bool((rollout.advantages != 0).any())))
        self.steps = 0 if live else self.steps + 1
        if self.steps == STEPS:
            warnings.warn(
                f"{STEPS} steps in a row without any advantage: {why(rollout)}", stacklevel=2
            )


def why(rollout: Rollout) -> str:
    """Return why a rollout has no advantage, and what to do."""
    known = rollout.rewards[~rollout.rewards.isnan()]
    if not len(known):
        return "no completion could be scored; look at what the rewards are given in samples.md"
    lowest, highest = known.min().item(), known.max().item()
    if lowest < highest:
        return (
            "within each group all completions have the same reward. More generations, a higher "
            "temperature or prompts of medium difficulty make them differ"
        )
    return (
        f"every completion has reward {lowest:g}. If that is the best reward, the task is learnt; "
        "if not, easier prompts, a supervised start or a reward for parts of the task give the "
        "first differences"
    )
