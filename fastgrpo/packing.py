"""Packing: select the rows that reach the kernels, and put results back in their places."""

from __future__ import annotations

import torch
from torch import Tensor

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
