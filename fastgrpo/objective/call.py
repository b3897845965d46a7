"""What a call gives the loss besides the rows to score, and the objective that it makes of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import checks
from fastgrpo.backend import Kernels
from fastgrpo.objective.aggregation import token_weights
from fastgrpo.objective.config import LossConfig, config_from_key
from fastgrpo.objective.corrections import sampler_gap, sampler_weights
from fastgrpo.objective.policy import Objective
from fastgrpo.objective.segments import Sequences
from fastgrpo.objective.terms import PolicyRows
from fastgrpo.packing import Index


class LossCall(NamedTuple):
    """The arguments of a loss: first as the user gave them, in any shape and as numbers or tensors,
    then as the ops take them, tensors of all rows, masked ones too."""

    cu_seqlens: Tensor  # (B + 1,)
    advantages: Tensor  # (B,) or (N,)
    old_logps: Tensor | None  # (N,)
    ref_logps: Tensor | None  # (N,)
    sampler_logps: Tensor | None  # (N,)
    groups: Tensor | None  # (B,) int64
    entropy_threshold: Tensor | None  # ()
    normalizer: Tensor | None  # ()
    seed: int | None
    config_key: str

    @property
    def config(self) -> LossConfig:
        return config_from_key(self.config_key)

    def inert(self, owner: Sequences) -> Tensor | None:
        """Return the rows (N,) bool that are known to have no gradient before they are scored."""
        config = self.config
        unknown = config.corrects_sequences and self.old_logps is None
        if unknown or not config.zero_advantage_is_inert:
            return None
        return owner.per_row(self.advantages) == 0

    def objective(
        self, owner: Sequences, mask: Tensor, where: Index, kernels: Kernels, dtype: torch.dtype
    ) -> Objective:
        """Return the loss of the rows that are picked."""
        config = self.config
        if self.normalizer is not None:
            _check_normalizer(self.normalizer)
        if self.entropy_threshold is not None:
            _check_threshold(self.entropy_threshold)
        sampler = None
        if config.needs_sampler and self.old_logps is not None:
            # Over all rows in the order of their sequences, which `where` may not keep.
            log_w = sampler_gap(self.old_logps.to(dtype), self.sampler_logps.to(dtype))
            segments = owner.all_segments(kernels)
            sampler = sampler_weights(config, log_w.masked_fill(~mask, 0.0), segments)[where]
        given = (
            owner.per_row(self.advantages), self.old_logps, self.ref_logps, self.sampler_logps
        )  # fmt: skip
        advantages, *logps = (None if x is None else x[where].to(dtype).contiguous() for x in given)
        for name, x in zip(("old_logps", "ref_logps", "sampler_logps"), logps, strict=True):
            if x is not None:
                checks.log_probs(name, x)
        weights = token_weights(config, owner, where, self.groups, self.normalizer, dtype)
        return Objective(
            config,
            kernels,
            PolicyRows(advantages, weights, *logps, sampler),
            owner.segments(kernels, where),
            self.entropy_threshold,
            self.seed,
        )


def _check_normalizer(value: Tensor) -> None:
    usable = (value >= checks.SMALLEST) & (value <= 1 / checks.SMALLEST)
    if checks.looks_at_values(value) and not usable:
        raise ValueError(f"normalizer: expected a number > 0, got {value.item()}")


def _check_threshold(value: Tensor) -> None:
    if checks.looks_at_values(value) and not value.isfinite():
        raise ValueError(f"entropy_threshold: expected a finite number, got {value.item()}")
