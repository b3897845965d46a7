"""Groups whose rewards are all equal make way for groups of further prompts (DAPO)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from . import ranks
from .completions import Rollout, concatenate
from .scoring import Scores
from .tasks import Example

# (prompts, those before them in other processes, number of the try) -> their rollout with
# advantages, and its scores
Draw = Callable[[list[Example], list[Example], int], tuple[Rollout, Scores]]


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
        counts = ranks.gathered(missing)
        following = list(islice(prompts, sum(counts)))
        if not following:
            break
        start = sum(counts[: ranks.rank()])
        if not missing:
            continue
        before, examples = following[:start], following[start : start + missing]
        rollout, found = draw(examples, before, attempt)
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
