"""Verdicts on disk: a file for each combination of device, software and route.

A file that cannot be read or written is as good as none.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch

import fastgrpo_kernels
from fastgrpo_kernels.runtime import HAS_TRITON, dot_precision, triton

Facts = dict[str, str]


def folder() -> Path:
    """Return where verdicts are kept: $XDG_CACHE_HOME/fastgrpo, by default in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fastgrpo"


def facts(device: torch.device, route: str) -> Facts:
    """Return everything that a verdict depends on."""
    return {
        "device": _name(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "",
        "kernels": _sources(),
        "fp32 products": dot_precision(32),
        "route": route,
    }


def load(facts: Facts) -> str | None:
    """Return the stored verdict: what was wrong, "" if nothing was; None if there is none."""
    try:
        content = json.loads(_path(facts).read_text())
        reason = content["reason"]
        return reason if content["facts"] == facts and isinstance(reason, str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(facts: Facts, reason: str) -> None:
    """Keep a verdict for later processes, if that is possible. Readers see all of it or nothing."""
    path = _path(facts)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"facts": facts, "reason": reason}, file, indent=1)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise


def _path(facts: Facts) -> Path:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return folder() / f"verdict-{digest[:32]}.json"


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"


@functools.lru_cache
def _driver() -> str:
    """Return the version of the kernel module that drives the GPU, as Linux tells it."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
    return "unknown"


@functools.lru_cache
def _sources() -> str:
    """Return a hash of the sources of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(fastgrpo_kernels.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
