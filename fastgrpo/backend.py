"""Which implementation of the launchers runs: the Triton kernels, or their torch twins."""

from __future__ import annotations

from types import ModuleType

import torch

import fastgrpo_kernels
from fastgrpo import torch_kernels
from fastgrpo_kernels.runtime import HAS_TRITON, INTERPRETED

BACKENDS = ("auto", "triton", "torch")


def resolve(device: torch.device, backend: str) -> ModuleType:
    """Return `fastgrpo_kernels` or `fastgrpo.torch_kernels`, which offer the same functions.

    "auto" takes the kernels on CUDA and ROCm devices when triton imports. An explicit backend
    never falls back: "triton" raises ValueError where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {list(BACKENDS)}, got {backend!r}")
    if backend == "torch":
        return torch_kernels
    on_gpu = device.type == "cuda"
    if backend == "auto":
        return fastgrpo_kernels if on_gpu and HAS_TRITON else torch_kernels
    if not HAS_TRITON:
        raise ValueError("backend='triton' needs the triton package: pip install triton")
    if not on_gpu and not INTERPRETED:
        raise ValueError(
            f"backend='triton' needs tensors on a CUDA or ROCm device, got {device}; "
            "to interpret the kernels on a CPU set TRITON_INTERPRET=1 before importing fastgrpo"
        )
    return fastgrpo_kernels
