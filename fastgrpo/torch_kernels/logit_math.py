"""Shared by the torch twins: the transform of raw logits, its slope, and the target entries."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo_kernels import Head, Tile


def scaled_logits(
    z: Tensor,  # (n, Vs)
    bias: Tensor | None,  # (Vs,) or as z
    inv_temperature: Tensor | None,  # (n,)
    head: Head,
) -> Tensor:
    """Return softcap(scale * (z + bias)) * inv_temperature; z itself if all of them are off."""
    if bias is not None:
        z = z + bias
    if head.logit_scale != 1.0:
        z = z * head.logit_scale
    if head.softcap:
        z = head.softcap * (z / head.softcap).tanh()
    return z if inv_temperature is None else z * inv_temperature[:, None]


def tile_logits(tile: Tile) -> Tensor:
    """Return the logits z (n, Vs) of a tile; its own z if there is nothing to transform."""
    return scaled_logits(tile.z, tile.bias, tile.rows.inv_temperature, tile.head)


def logit_slope(tile: Tile, like: Tensor) -> Tensor | None:
    """Return dz/dz0 without a softcap, (n or 1, 1); None for 1."""
    scale, inv_temperature = tile.head.logit_scale, tile.rows.inv_temperature
    if inv_temperature is None:
        return None if scale == 1.0 else like.new_full((1, 1), scale)
    return inv_temperature[:, None] * scale


def entry_slope(z: Tensor, inv_temperature: Tensor | None, head: Head) -> Tensor:
    """Return dz/dz0 of entries z, in their shape; `inv_temperature` is broadcast to it."""
    slope = torch.full_like(z, head.logit_scale)
    if head.softcap:
        capped = z if inv_temperature is None else z / inv_temperature
        slope = slope * (1 - (capped / head.softcap).square())
    return slope if inv_temperature is None else slope * inv_temperature


def targets(ids: Tensor, vocab_start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the rows whose id lies in the slice, and their columns there."""
    columns = ids - vocab_start
    rows = ((columns >= 0) & (columns < width)).nonzero()[:, 0]
    return rows, columns[rows]


def tile_targets(tile: Tile) -> tuple[Tensor, Tensor]:
    """Return the rows whose id lies in the tile, and their columns there."""
    return targets(tile.rows.ids, tile.columns.start, tile.z.shape[1])
