"""Packing: select the rows that reach the kernels, and put results back in their places."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgrpo import checks

Index = Tensor | slice
"""Selected rows: their indices, or slice(None) for all rows, which copies nothing."""


def unmasked(mask: Tensor) -> Index:
    """Return the rows where mask (N,) is True. One host synchronisation."""
    checks.no_capture(mask.device)
    rows = mask.nonzero()[:, 0]
    return slice(None) if len(rows) == len(mask) else rows


def live_first(mask: Tensor, inert: Tensor | None) -> tuple[Index, int]:
    """Return the unmasked rows, those that are not inert first, and the number of the latter.

    Without `inert` no row is inert, and the rows keep their order. One host synchronisation.
    """
    if inert is None:
        rows = unmasked(mask)
        return rows, len(mask) if isinstance(rows, slice) else len(rows)
    checks.no_capture(mask.device)
    rank = torch.where(mask, inert.to(torch.uint8), 2)
    num_live, rest = torch.stack([(rank == 0).sum(), (rank == 1).sum()]).tolist()
    if num_live == len(mask):
        return slice(None), num_live
    return rank.argsort(stable=True)[: num_live + rest], num_live


def spread(x: Tensor | None, rows: Index, n: int) -> Tensor | None:
    """Return n rows with the results of some rows in their places, and 0 elsewhere."""
    if x is None or isinstance(rows, slice):
        return x
    return x.new_zeros((n, *x.shape[1:])).index_copy_(0, rows, x)


def entries_of(cu: Tensor, rows: Index) -> tuple[Index, Tensor]:
    """Return which entries some rows have, and where those of each row begin (n + 1,).

    Row i has the entries cu[i] to cu[i + 1]; cu is (N + 1,) int64. One host synchronisation.
    """
    if isinstance(rows, slice):
        if rows == slice(None):
            return rows, cu
        rows = torch.arange(len(cu) - 1, device=cu.device)[rows]
    counts = cu.diff()[rows]
    bounds = pad(counts.cumsum(0), (1, 0))
    shift = torch.repeat_interleave(cu[:-1][rows] - bounds[:-1], counts)
    return torch.arange(len(shift), device=cu.device) + shift, bounds


def rows_of_entries(cu: Tensor, entries: int) -> Tensor:
    """Return the row (M,) int64 of each of M entries; cu is (n + 1,), from 0 to M."""
    return torch.repeat_interleave(cu.diff(), output_size=entries)
