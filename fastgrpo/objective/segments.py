"""Which sequence each row belongs to, and reductions over sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import checks
from fastgrpo.backend import Kernels
from fastgrpo.packing import Index


class Sequences(NamedTuple):
    """Which sequence each row belongs to."""

    cu_seqlens: Tensor  # (B + 1,)
    index: Tensor  # (N,) int64
    lengths: Tensor  # (B,) int64 unmasked rows of each sequence

    @classmethod
    def of(cls, cu_seqlens: Tensor, mask: Tensor) -> Sequences:
        checks.bounds_values(cu_seqlens, len(mask))
        positions = torch.arange(len(mask), device=mask.device)
        index = torch.bucketize(positions, cu_seqlens[1:].to(torch.int64), right=True)
        lengths = torch.zeros(len(cu_seqlens) - 1, dtype=torch.int64, device=mask.device)
        return cls(
            cu_seqlens.contiguous(), index, lengths.index_add_(0, index, mask.to(torch.int64))
        )

    def per_row(self, x: Tensor) -> Tensor:
        """Return advantages (N,), given one per sequence (B,) or per row."""
        if len(x) != len(self.lengths):
            return x
        if len(x) == len(self.index):
            checks.one_row_each(self.cu_seqlens)
        return x[self.index]

    def segments(self, kernels: Kernels, rows: Index) -> Segments:
        """Return the sequences of the unmasked rows, in their order."""
        bounds = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0))
        return Segments(kernels, bounds, self.lengths[self.index[rows]])

    def all_segments(self, kernels: Kernels) -> Segments:
        """Return the sequences of all rows: means are right where masked rows hold 0."""
        return Segments(kernels, self.cu_seqlens, self.lengths[self.index])


class Segments(NamedTuple):
    """Consecutive rows (n,) that belong together, and reductions that every row gets to see."""

    kernels: Kernels
    cu_seqlens: Tensor  # (B + 1,)
    counts: Tensor  # (n,) int64 rows that the mean of a row's segment divides by

    def sum(self, x: Tensor) -> Tensor:
        return self.kernels.segment_reduce(x, self.cu_seqlens, "sum")

    def max(self, x: Tensor) -> Tensor:
        return self.kernels.segment_reduce(x, self.cu_seqlens, "max")

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.counts.clamp(min=1)
