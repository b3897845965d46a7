"""The end of a run whose loss or gradients are no longer finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from . import ranks
from .atomic import whole_file
from .best_effort import BestEffort
from .completions import Rollout

STEPS = 5
DUMP = "not-finite.safetensors"


class NotFiniteError(RuntimeError):
    """Loss or gradient have not been finite for several steps in a row, in every process."""


class NotFinite:
    """Counts steps without an update, and ends the run at the fifth in a row."""

    def __init__(self, folder: Path, steps: int = 0) -> None:
        self.folder, self.steps = folder, steps

    def watch(self, metrics: dict[str, float], rollout: Rollout) -> None:
        """Take note of a step; at the fifth write its completions and raise NotFiniteError.

        All processes do so, and the first writes the completions of all.
        """
        self.steps = self.steps + 1 if metrics.get("skipped") == 1 else 0
        if self.steps == STEPS:
            parts = ranks.gathered(tensors_of(rollout))
            kept = ranks.of_first(lambda: self._dump(parts))
            raise NotFiniteError(
                f"the loss or its gradient was not finite in {STEPS} steps in a row, which were "
                f"skipped; the completions of the last are {kept}"
            )

    def _dump(self, parts: Sequence[dict[str, Tensor]]) -> str:
        """Write what each process has; return where it is."""
        path = self.folder / DUMP
        prefixes = ["", *(f"process{i}." for i in range(1, len(parts)))]
        tensors = {
            prefix + name: tensor
            for prefix, part in zip(prefixes, parts, strict=True)
            for name, tensor in part.items()
        }
        with BestEffort(str(path)) as dump, whole_file(path) as written:
            save_file(tensors, written)
        return "lost" if dump.failed else f"in {path}"


def tensors_of(rollout: Rollout) -> dict[str, Tensor]:
    """Return the tensors of a rollout on the CPU by their names; those of prompts are numbered."""
    found = {f"prompts.{i}": ids.cpu() for i, ids in enumerate(rollout.prompts)}
    for field in fields(rollout):
        value = getattr(rollout, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value.cpu().contiguous()
    return found
