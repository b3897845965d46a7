"""The batch of completions that the training loop samples, scores and learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """B completions with what is known about them; prompts are padded left, completions right."""

    prompt_ids: Tensor  # (B, P) int64
    prompt_mask: Tensor  # (B, P) bool
    completion_ids: Tensor  # (B, T) int64
    completion_mask: Tensor  # (B, T) bool, up to and including the end-of-sequence token
    advantages: Tensor | None = None  # (B,) fp32
    old_logps: Tensor | None = None  # (B, T) fp32
    ref_logps: Tensor | None = None  # (B, T) fp32

    def __len__(self) -> int:
        return self.completion_ids.shape[0]

    def __getitem__(self, rows: Tensor) -> Rollout:
        """Return some of the completions, without the columns in which they are all masked."""
        picked = {
            f.name: value[rows]
            for f in fields(self)
            if (value := getattr(self, f.name)) is not None
        }
        prompt = picked["prompt_mask"].sum(dim=1).max().item()
        completion = picked["completion_mask"].sum(dim=1).max().item()
        for name, value in picked.items():
            if name.startswith("prompt"):
                picked[name] = value[:, value.shape[1] - prompt :]
            elif value.dim() == 2:
                picked[name] = value[:, :completion]
        return Rollout(**picked)

    def micro_batches(self, size: int) -> Iterator[Tensor]:
        """Yield the rows of each micro-batch; completions of like length go together."""
        yield from self.completion_mask.sum(dim=1).argsort(stable=True).split(size)
