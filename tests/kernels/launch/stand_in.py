"""A stand-in for the CUDA driver: how it is built, and how a process comes to launch on it.

Triton's own JIT runs whole on it: the specialisation of arguments, ptxas, the launcher and the
encoding of TMA descriptors. Host tensors stand for those of a device. Nothing computes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import triton

from fastgrpo_kernels import anchored_variant, runtime

# Freed memory is overwritten: what no kernel computes cannot be a right answer of before.
FORGETFUL_MALLOC = "glibc.malloc.perturb=170:glibc.malloc.tcache_count=0"
SOURCE = Path(__file__).with_name("stand_in_driver.c")
ROOT = SOURCE.parents[3]
# Architecture class -> compute capability, and the bytes of shared memory that a block can have.
PARTS = {"sm_80": ((8, 0), 166_912), "sm_90": ((9, 0), 232_448), "sm_100": ((10, 0), 232_448)}


def build(folder: Path) -> None:
    """Compile the driver into a folder, under the name that Triton links with."""
    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-I", headers, "-o", library, SOURCE]
    subprocess.run(command, check=True)


def start(folder: Path, part: str, *families: str) -> subprocess.Popen:
    """Start a process that runs cases on the driver in a folder, where its output goes too."""
    command = [sys.executable, "-m", "tests.kernels.launch.run_cases", part, *families]
    with report_of(folder, part).open("w") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(folder, part), stdout=out, stderr=subprocess.STDOUT
        )


def report_of(folder: Path, part: str) -> Path:
    return folder / f"{part}.jsonl"


def environment(folder: Path, part: str) -> dict[str, str]:
    path = os.environ.get("LD_LIBRARY_PATH")
    own = {
        "TRITON_CACHE_DIR": folder / "cache",
        "TRITON_LIBCUDA_PATH": folder,
        "LD_LIBRARY_PATH": f"{folder}:{path}" if path else folder,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        anchored_variant.SWITCH: "0",
        "GLIBC_TUNABLES": FORGETFUL_MALLOC,
        "STAND_IN_LOG": folder / f"{part}.log",
        "STAND_IN_SHARED": PARTS[part][1],
    }
    return os.environ | {name: str(value) for name, value in own.items()}


def activate(part: str) -> None:
    """Make torch, Triton and the launchers of this process believe that they have this part."""
    capability, _ = PARTS[part]
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    cuda = torch.device("cuda")
    for look_up in (runtime.architecture, runtime.multiprocessors):
        _replace(look_up, lambda device, look_up=look_up: look_up(cuda))


def _replace(function: Callable, other: Callable) -> None:
    """Replace a function in every module of the package that has imported it."""
    for module in [m for name, m in sys.modules.items() if name.startswith("fastgrpo_kernels")]:
        for name, value in list(vars(module).items()):
            if value is function:
                setattr(module, name, other)


def launched() -> list[str]:
    """Return the kernels launched so far in this process, in order."""
    log = Path(os.environ["STAND_IN_LOG"])
    return log.read_text().split() if log.exists() else []
