"""Which completions enter the model, and which of them together."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

import fastgrpo
from fastgrpo import LossConfig

from . import ranks
from .completions import Rollout
from .layouts import Layout


def live_completions(rollout: Rollout, loss: LossConfig) -> Tensor:
    """Return the completions (K,) int64, ascending, that can have a gradient.

    Where the loss allows it, those whose advantage is exactly 0 have none and are left out; the
    others keep theirs, divided by `step_normalizer`. A mean over prompts counts the tokens of a
    whole group, so that there a group stays or goes as one.
    """
    device = rollout.lengths.device
    if not loss.zero_advantage_sequence_is_inert:
        return torch.arange(len(rollout), device=device)
    live = rollout.advantages != 0
    if loss.aggregation == "prompt_mean":
        groups = torch.zeros(len(rollout.prompts), dtype=torch.bool, device=device)
        groups[rollout.prompt_index[live]] = True
        live = groups[rollout.prompt_index]
    return live.nonzero()[:, 0]


def step_normalizer(rollout: Rollout, loss: LossConfig) -> Tensor | float | None:
    """Return the denominator of the optimizer step, counted over the completions of all processes.

    It is divided by their number, as their gradients are averaged.
    """
    if loss.aggregation == "token_sum":
        return None
    if loss.aggregation == "prompt_mean":
        return sum(ranks.gathered(len(rollout.prompts))) / ranks.count()
    mask = rollout.completion_mask
    return fastgrpo.count_normalizer(mask, loss, process_group=ranks.group())


def micro_batches(
    rollout: Rollout,
    chosen: Tensor,  # (K,) int64
    max_tokens: int,
    layout: Layout,
    loss: LossConfig | None = None,
) -> list[Tensor]:
    """Return the chosen completions of each micro-batch, (K_i,) int64 ascending.

    A micro-batch forwards at most `max_tokens`, padding and repeated prompts included. Where the
    layout forwards a prompt once for its group, groups that fit stay whole. A completion that is
    longer than the budget stands alone, with a warning. A loss that compares the completions of
    a group, or of the batch, gets them in one call all the same.
    """
    sizes = _Sizes.of(rollout, layout)
    batches: list[list[int]] = []
    for unit in _units(sizes, chosen.tolist(), max_tokens, loss):
        fits = (batch for batch in batches if sizes.cost(batch + unit) <= max_tokens)
        if (batch := next(fits, None)) is None:
            batches.append(list(unit))
        else:
            batch += unit
    if any(sizes.cost(batch) > max_tokens for batch in batches):
        warnings.warn(
            f"max_tokens_per_microbatch: {max_tokens} tokens do not hold what has to be forwarded "
            "together; it is forwarded together all the same",
            stacklevel=2,
        )
    return [torch.tensor(sorted(batch), device=chosen.device) for batch in batches]


class _Sizes(NamedTuple):
    prompts: list[int]  # the length of each prompt
    index: list[int]  # the prompt of each completion
    lengths: list[int]  # the length of each completion
    layout: Layout

    @classmethod
    def of(cls, rollout: Rollout, layout: Layout) -> _Sizes:
        prompts = [len(prompt) for prompt in rollout.prompts]
        return cls(prompts, rollout.prompt_index.tolist(), rollout.lengths.tolist(), layout)

    def cost(self, chosen: list[int]) -> int:
        """Return how many tokens the completions cost in one forward."""
        lengths = [(self.prompts[p], [self.lengths[i] for i in g]) for p, g in self.groups(chosen)]
        return self.layout.tokens(lengths)

    def groups(self, chosen: list[int]) -> Iterable[tuple[int, list[int]]]:
        """Return each prompt with its completions among the chosen."""
        groups: dict[int, list[int]] = {}
        for i in chosen:
            groups.setdefault(self.index[i], []).append(i)
        return groups.items()


def _units(
    sizes: _Sizes, chosen: list[int], max_tokens: int, loss: LossConfig | None
) -> list[list[int]]:
    """Return completions that stay together, those that cost most first."""
    if loss is not None and loss.compares_sequences and chosen:
        return [chosen]
    whole = loss is not None and loss.aggregation == "prompt_mean"
    units = []
    for _, group in sizes.groups(chosen):
        kept = whole or (sizes.layout.shares and sizes.cost(group) <= max_tokens)
        units += [group] if kept else [[i] for i in group]
    return sorted(units, key=lambda unit: -sizes.cost(unit))
