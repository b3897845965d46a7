"""Groups whose rewards are all equal make way for groups of further prompts (DAPO)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from . import ranks
from .completions import Rollout, concatenate
from .scoring import Scores
from .tasks import Example

# (prompts, number of the try) -> their rollout with advantages, and its scores
Draw = Callable[[list[Example], int], tuple[Rollout, Scores]]


def draw_groups(
    draw: Draw, prompts: Iterator[Example], num_prompts: int, tries: int
) -> tuple[Rollout, Scores, int]:
    """Draw ``num_prompts`` groups, and replace those without an advantage up to ``tries`` times.

    What the last try draws stays, so that the batch is full in any case. With several processes
    each draws its part, and all go on with the same ``prompts``.

    Returns the batch, the scores of all that was drawn, and how many groups were dropped, the
    latter two of all processes.
    """
    kept, scores, missing, dropped = [], [], len(ranks.part(range(num_prompts))), 0
    for attempt in range(tries + 1):
        examples = _next(prompts, missing)
        if examples is None:
            break
        if not examples:
            continue
        rollout, found = draw(examples, attempt)
        scores.append(found)
        live = rollout.live_groups
        if attempt < tries and not live.all():
            dropped += len(live) - int(live.sum())
            rollout = rollout[live[rollout.prompt_index].nonzero()[:, 0]]
        kept.append(rollout)
        missing -= len(rollout.prompts)
    scores = Scores.joined(ranks.gathered(Scores.joined(scores)))
    batch = concatenate([part for part in kept if len(part)])
    return batch, scores, sum(ranks.gathered(dropped))


def _next(prompts: Iterator[Example], count: int) -> list[Example] | None:
    """Return the next ``count`` prompts for this process; None if no process needs any."""
    counts = ranks.gathered(count)
    following = list(islice(prompts, sum(counts)))
    start = sum(counts[: ranks.rank()])
    return following[start : start + count] if following else None
