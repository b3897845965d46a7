"""Describe the machine, the versions and the commit that a figure comes from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "verl",
    "quack-kernels",
)
GPU_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Return the GPU's name, or the CPU's with its core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return f"{name} {os.cpu_count()} cores"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """Return the installed versions of what is compared; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str | None:
    """Return the commit's hash, with "+changes" when the tree differs; None without a commit."""
    head = _output("git", "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if _output("git", "status", "--porcelain") else "")


def gpu_state() -> dict[str, str] | None:
    """Return name, driver, clocks, power and temperature now; None without nvidia-smi."""
    line = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    if line is None or not torch.cuda.is_available():
        return None
    values = line.splitlines()[0].split(", ")
    return dict(zip(GPU_FIELDS, values, strict=False))


def header() -> str:
    """Return one line: device, threads, versions."""
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{device_name()}, {torch.get_num_threads()} threads | {installed}"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
