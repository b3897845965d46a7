"""Groups whose rewards are all equal make way for groups of further prompts (DAPO)."""

from __future__ import annotations

from collections.abc import Callable

from .completions import Rollout, concatenate
from .scoring import Scores

# (number of prompts, number of the try) -> their rollout with advantages, and its scores
Draw = Callable[[int, int], tuple[Rollout, Scores]]


def draw_groups(draw: Draw, num_prompts: int, tries: int) -> tuple[Rollout, Scores, int]:
    """Draw ``num_prompts`` groups, and replace those without an advantage up to ``tries`` times.

    What the last try draws stays, so that the batch is full in any case.

    Returns the batch, the scores of all that was drawn, and how many groups were dropped.
    """
    kept, scores, missing, dropped = [], [], num_prompts, 0
    for attempt in range(tries + 1):
        rollout, found = draw(missing, attempt)
        scores.append(found)
        live = rollout.live_groups
        if attempt < tries and not live.all():
            dropped += len(live) - int(live.sum())
            rollout = rollout[live[rollout.prompt_index].nonzero()[:, 0]]
        kept.append(rollout)
        missing -= len(rollout.prompts)
        if not missing:
            break
    return concatenate([part for part in kept if len(part)]), Scores.joined(scores), dropped
