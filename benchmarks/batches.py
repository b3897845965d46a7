"""Make the batch that a mode works on."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.data import LossInputs, profile_batch, random_batch, rl_batch
from benchmarks.measure import MODES, SUPPORT_MODES
from benchmarks.profiles import newest_profile
from benchmarks.shapes import Shape
from benchmarks.supports import PROFILES, with_support


def make_batch(shape: Shape, dtype: torch.dtype, mode: str, device: torch.device) -> LossInputs:
    """Return the batch that `mode` works on."""
    # Past its limit of recompilations torch.compile silently runs eagerly.
    torch.compiler.reset()
    chosen = (MODES | SUPPORT_MODES)[mode]
    if chosen.policy is None:
        batch = random_batch(shape, dtype, device)
    else:
        batch = profile_batch(shape, dtype, device, profile=newest_profile(chosen.policy))
    batch = batch.to(dtype, frozen=chosen.frozen)
    if chosen.zero_advantage or chosen.padding:
        batch = rl_batch(batch, chosen.zero_advantage, chosen.padding)
    if chosen.support is not None:
        batch = with_support(batch, PROFILES[chosen.support].counts(shape.rows))
    return dataclasses.replace(batch, skip_zero_advantage=chosen.skip_zero_advantage)
