"""What each step of the sampling kept of the vocabulary, until it belongs to packed tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import Support


class KeptIds:
    """The kept ids of S completions, step by step: never a mask of more than one step.

    Args:
        count: S.
        length: the tokens that a completion has at most.
        device: of the scores.
    """

    def __init__(self, count: int, length: int, device: torch.device) -> None:
        self._steps: list[Support] = []
        self._rows = 0
        # The row, among those of all steps, that a completion's token was drawn from.
        self._drawn_from = torch.zeros(count, length, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, samples: Tensor, place: int) -> None:
        """Take what a step kept: what is not -inf.

        Args:
            scores: (rows, V), the processed logits.
            samples: (rows,) int64, the completions that they belong to.
            place: of the tokens in their completions.
        """
        rows = torch.arange(len(samples), device=samples.device)
        self._drawn_from[samples, place] = self._rows + rows
        self._rows += len(samples)
        self._steps.append(Support.of_mask(scores > -torch.inf))

    def support(self, mask: Tensor) -> Support:
        """Return the support of the tokens at `mask` (S, T) bool, completion by completion."""
        rows = self._drawn_from[:, : mask.shape[1]][mask]
        return Support.cat(self._steps).select(rows)
