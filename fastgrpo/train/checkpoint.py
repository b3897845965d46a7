"""Checkpoints that are written completely or not at all, and found again."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from . import ranks
from .atomic import whole
from .model import Policy
from .parts import load_parts, save_parts

TENSORS, VALUES = "training.safetensors", "training.json"
PARTS = "parts"  # folder of tensors of which each process has a part
KNOWN = {"parts", "step", "task", "optimizer"}  # what every state has, and no other file
TENSOR = "tensor"  # key of what stands in VALUES for a tensor


def save_checkpoint(policy: Policy, folder: Path) -> None:
    """Write model and tokenizer; an old ``folder`` is replaced only when all is written.

    The first process writes. The others have to be there where the weights lie in all of them.
    """
    with policy.gathered():
        if ranks.rank() == 0:
            with whole(folder) as written:
                _write_model(policy, written)


def save_training(policy: Policy, state: dict[str, Any], folder: Path, step: int) -> None:
    """Write ``folder``/checkpoint-STEP: a model as `save_checkpoint` writes it, and the ``state``.

    A state is made of dicts with strings as keys, lists, tensors and what JSON knows. All processes
    call it; the first writes into its ``folder``, and all write their parts of DTensors there.
    """
    tensors: dict[str, Tensor] = {}
    values = _without_tensors(state, "", tensors)
    parts = {name: tensors.pop(name) for name in [*tensors] if isinstance(tensors[name], DTensor)}
    values[PARTS] = {name: list(part.shape) for name, part in parts.items()}
    first = ranks.rank() == 0
    with ExitStack() as stack:
        written = ranks.of_first(lambda: stack.enter_context(whole(folder / f"checkpoint-{step}")))
        if parts:
            save_parts(parts, written / PARTS)
        with policy.gathered():
            if first:
                _write_model(policy, written)
        if first:
            save_file(tensors, written / TENSORS)
            (written / VALUES).write_text(json.dumps(values), encoding="utf-8")


def load_training(folder: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Return the state that `save_training` wrote; ValueError if it is not whole.

    Tensors that were in parts are parted over the ``mesh`` of all processes.
    """
    try:
        values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        if not values.keys() >= KNOWN:
            raise KeyError(*KNOWN - values.keys())
        tensors = load_file(folder / TENSORS)
        if shapes := values.pop(PARTS):
            tensors |= load_parts(folder / PARTS, shapes, mesh)
        return _with_tensors(values, tensors)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"resume: expected {TENSORS} and {VALUES} of a run in {folder}: {error}"
        ) from error


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the steps with a checkpoint and where they lie, the first one first."""
    if not folder.is_dir():
        return []
    found = [(re.fullmatch("checkpoint-([0-9]+)", p.name), p) for p in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def remove_older(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the last ``keep``, and what a write that was cut has left."""
    for _, path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)
    for path in folder.glob("checkpoint*.tmp"):
        shutil.rmtree(path)


def _write_model(policy: Policy, folder: Path) -> None:
    policy.model.save_pretrained(folder, state_dict=policy.weights())
    policy.tokenizer.save_pretrained(folder)
    if policy.generation is not None:
        # As text: save_pretrained refuses values at odds with each other, which models have.
        text = policy.generation.to_json_string()
        (folder / "generation_config.json").write_text(text, encoding="utf-8")


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value in which {"tensor": NAME} stands for each tensor; put it into ``tensors``."""
    if isinstance(value, Tensor):
        own = value.detach()
        tensors[name] = own if isinstance(own, DTensor) else own.cpu().contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        return {
            k: _without_tensors(v, f"{name}.{k}" if name else k, tensors) for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        return {k: _with_tensors(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_tensors(v, tensors) for v in value]
    return value
