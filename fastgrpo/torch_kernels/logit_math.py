"""What the torch twins share: the transform of raw logits, its slope, and where targets are."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_logits(
    z: Tensor, bias: Tensor | None, inv_temperature: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Return softcap(scale * (z + bias)) * inv_temperature; z itself when all of them are off."""
    if bias is not None:
        z = z + bias
    if scale != 1.0:
        z = z * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z if inv_temperature is None else z * inv_temperature[:, None]


def logit_slope(inv_temperature: Tensor | None, logit_scale: float, like: Tensor) -> Tensor | None:
    """Return dz/dz0 without a softcap, (n or 1, 1); None for 1."""
    if inv_temperature is None:
        return None if logit_scale == 1.0 else like.new_full((1, 1), logit_scale)
    return inv_temperature[:, None] * logit_scale


def targets(ids: Tensor, vocab_start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the rows whose id lies in the slice, and its column there."""
    columns = ids - vocab_start
    rows = ((columns >= 0) & (columns < width)).nonzero()[:, 0]
    return rows, columns[rows]
