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


def folder() -> Path | None:
    """Return where verdicts are kept: $XDG_CACHE_HOME/fastgrpo, by default in ~/.cache.

    None if there is no such place: without a home, or for a relative path.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return base / "fastgrpo" if base.is_absolute() else None


def facts(device: torch.device, route: str) -> Facts:
    """Return everything that a verdict depends on."""
    return {
        "device": _name(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "",
        "sources": _sources(),
        "products": _products(),
        "route": route,
    }


def load(facts: Facts) -> str | None:
    """Return the stored verdict: what was wrong, "" if nothing was; None if there is none."""
    path = _path(facts)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text())
        reason = content["reason"]
        return reason if content["facts"] == facts and isinstance(reason, str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(facts: Facts, reason: str) -> None:
    """Keep a verdict for later processes, if that is possible. Readers see all of it or nothing."""
    path = _path(facts)
    if path is None:
        return
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


def _path(facts: Facts) -> Path | None:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    place = folder()
    return None if place is None else place / f"verdict-{digest[:32]}.json"


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"


@functools.lru_cache
def _driver() -> str:
    """Return the version of the kernel module that drives the GPU, as Linux tells it.

    Where it does not, in WSL for instance, the newest CUDA that the driver knows.
    """
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
    newest = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "unknown" if newest is None else str(newest())


def _products() -> str:
    """Return the settings under which products are rounded, or made by another kernel."""
    matmul = torch.backends.cuda.matmul
    flags = ("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction")
    flags += ("allow_bf16_reduced_precision_reduction",)
    settings = [dot_precision(32), *(f"{name}={getattr(matmul, name, None)}" for name in flags)]
    variables = ("NVIDIA_TF32_OVERRIDE", "FASTGRPO_WARP_SPECIALIZE")
    return " ".join([*settings, *(f"{name}={os.environ.get(name)}" for name in variables)])


@functools.lru_cache
def _sources() -> str:
    """Return a hash of the sources of all kernels, of what calls them, and of the check."""
    here = Path(__file__).parent
    folders = (Path(fastgrpo_kernels.__file__).parent, here, here.with_name("head"))
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
