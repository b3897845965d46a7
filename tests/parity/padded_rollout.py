"""Shared by the formulas of the trainers: a padded rollout and masked reductions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.testing import Batch


class Rollout:
    """Operands of a trainer's loss: float64, padded with 0, with autograd through logps."""

    def __init__(self, batch: Batch) -> None:
        self.hidden = batch.hidden.double().requires_grad_()
        self.weight = batch.weight.double().requires_grad_()
        self.mask = batch.completion_mask
        self.lengths = self.mask.sum(1)
        logps = (self.hidden @ self.weight.T).log_softmax(-1)
        self.logps = self._clean(logps.gather(-1, batch.completion_ids[..., None])[..., 0])
        self.old, self.ref, self.sampler = (self._clean(x.double()) for x in batch[5:])
        advantages = batch.advantages.double()
        self.A = advantages if advantages.dim() == 2 else advantages[:, None].expand_as(self.logps)

    def _clean(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0.0)

    def token_mean(self, x: Tensor) -> Tensor:
        return self._clean(x).sum() / self.mask.sum()

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Of each sequence over its tokens, (B, 1); 0 for an empty one."""
        return self._clean(x).sum(1, keepdim=True) / self.lengths.clamp(min=1)[:, None]
