"""The states of all random number generators that a step may use, as JSON and safetensors know."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and PyTorch's generators, of all GPUs too."""
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": numpy | {"state": {k: _plain(v) for k, v in numpy["state"].items()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set them to what `random_state` returned, there or on a machine with as many GPUs."""
    version, numbers, following = state["python"]
    random.setstate((version, tuple(numbers), following))
    inner = state["numpy"]["state"]
    key = np.asarray(inner["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": inner | {"key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
