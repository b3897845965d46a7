"""Gradients with respect to single logits, where a row has a few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo_kernels import Head, Logps, Upstream


def entry_gradients(
    z: Tensor,  # (E,)
    is_target: Tensor,  # (E,) bool
    inv_temperature: Tensor | None,  # (E,)
    head: Head,
    scored: Logps,  # of each entry's row
    upstream: Upstream,
    inclusion: Tensor | None = None,  # (E,) probability with which an entry is there; None: 1
) -> Tensor:
    """Return dL/dz0 (E,) of entries: exact at the target, elsewhere with p / inclusion for p."""
    p = (z - scored.lse).exp()
    weight = p if inclusion is None else torch.where(is_target, p, p / inclusion)
    gradient = torch.where(
        is_target, -torch.expm1(scored.logps) * upstream.dlogps, -weight * upstream.dlogps
    )
    if upstream.dentropy is not None:
        surprise = torch.where(p == 0, 0.0, z - scored.lse + scored.entropy)
        gradient = gradient - upstream.dentropy * weight * surprise
    return gradient * entry_slope(z, inv_temperature, head)


def entry_slope(z: Tensor, inv_temperature: Tensor | None, head: Head) -> Tensor:
    """Return dz/dz0 of entries z, in their shape; `inv_temperature` is broadcast to it."""
    slope = torch.full_like(z, head.logit_scale)
    if head.softcap:
        capped = z if inv_temperature is None else z / inv_temperature
        slope = slope * (1 - (capped / head.softcap).square())
    return slope if inv_temperature is None else slope * inv_temperature
