"""The end of a run whose loss or gradients are no longer finite."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .atomic import whole_file
from .best_effort import BestEffort
from .completions import Rollout

STEPS = 5
DUMP = "not-finite.safetensors"


class NotFiniteError(RuntimeError):
    """Loss or gradient have not been finite for several steps in a row."""


class NotFinite:
    """Counts steps without an update, and ends the run at the fifth in a row."""

    def __init__(self, folder: Path, steps: int = 0) -> None:
        self.folder, self.steps = folder, steps

    def watch(self, metrics: dict[str, float], rollout: Rollout) -> None:
        """Take note of a step; at the fifth write its completions and raise NotFiniteError."""
        self.steps = self.steps + 1 if metrics.get("skipped") == 1 else 0
        if self.steps == STEPS:
            path = self.folder / DUMP
            with BestEffort(str(path)) as dump, whole_file(path) as written:
                save_file(tensors_of(rollout), written)
            kept = "lost" if dump.failed else f"in {path}"
            raise NotFiniteError(
                f"the loss or its gradient was not finite in {STEPS} steps in a row, which were "
                f"skipped; the completions of the last are {kept}"
            )


def tensors_of(rollout: Rollout) -> dict[str, Tensor]:
    """Return the tensors of a rollout by their names; those of prompts are numbered."""
    found: dict[str, Tensor] = {f"prompts.{i}": ids for i, ids in enumerate(rollout.prompts)}
    for field in fields(rollout):
        value = getattr(rollout, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value.contiguous()
    return found
