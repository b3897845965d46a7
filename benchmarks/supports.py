"""Supports as samplers leave them: how many ids a token keeps, and which.

The numbers of ids follow what was measured on real models: a share of the tokens keeps one id, the
others a log-normal number. The ids themselves are drawn uniformly, all of a token's distinct. Real
tokens share frequent ids, which is kinder to caches and touches fewer rows of the weight.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

import fastgrpo
from benchmarks.data import LossInputs

SPREAD = 1.2  # of the logarithm of the number of ids, where it is not one
MOST = 512  # ids of a token: a sampler's usual top-k


class SupportProfile(NamedTuple):
    """How many ids the tokens of a rollout keep."""

    mean: float
    alone: float  # share of the tokens with one id
    source: str

    def counts(self, rows: int) -> Tensor:
        """Return the numbers of ids (rows,) int64 of as many tokens, in a fixed random order."""
        alone = round(self.alone * rows)
        quantiles = (torch.arange(rows - alone, dtype=torch.float64) + 0.5) / (rows - alone)
        shape = torch.exp(SPREAD * torch.special.ndtri(quantiles))
        low, high = 0.0, 1e4
        for _ in range(60):  # the factor that gives the mean, rounded and bounded as it is
            factor = (low + high) / 2
            counts = (factor * shape).round().clamp(2, MOST)
            few = alone + counts.sum() < self.mean * rows
            low, high = (factor, high) if few else (low, factor)
        counts = torch.cat([torch.ones(alone, dtype=torch.int64), counts.long()])
        return counts[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]


PROFILES = {
    "8": SupportProfile(8, 0.46, "prime-rl#2979: its authors' runs"),
    "12": SupportProfile(12, 0.21, "SmolLM2-135M sampled under top-p 0.95 and top-k 512"),
    "76": SupportProfile(76, 0.21, "the same filter on its rows at temperature 1"),
    "150": SupportProfile(150, 0.21, "the same filter on rows of a larger vocabulary"),
}


def draw_support(ids: Tensor, counts: Tensor, vocab: int, seed: int = 0) -> fastgrpo.Support:
    """Return a support of tokens ids (...): each with itself and counts (N,) - 1 other ids.

    A token with more ids than the vocabulary has keeps all of it.
    """
    counts, g = counts.clamp(max=vocab), torch.Generator().manual_seed(seed)
    flat, kept = ids.flatten().cpu(), []
    for token, count in zip(flat.tolist(), counts.tolist(), strict=True):
        order = torch.randperm(vocab - 1, generator=g)[: count - 1]
        kept += [torch.tensor([token]), order + (order >= token)]
    cu = pad(counts.cumsum(0), (1, 0))
    return fastgrpo.Support(torch.cat(kept), cu, tuple(ids.shape)).to(ids.device)


def with_support(batch: LossInputs, counts: Tensor) -> LossInputs:
    """Return `batch` with a support of so many ids, and the old log-probs of this very policy."""
    support = draw_support(batch.completion_ids, counts, len(batch.weight))
    with torch.no_grad():
        old_logps = fastgrpo.linear_logps(
            batch.hidden, batch.weight, batch.completion_ids, support=support
        ).logps
    return dataclasses.replace(batch, support=support, old_logps=old_logps)
