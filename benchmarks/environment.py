"""Describe the machine, the versions and the commit that a figure comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
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
    """Return the commit's hash, with "+changes" when the tree differs; None without a commit.

    The records themselves do not count as a difference.
    """
    head = _output("git", "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return head + ("+changes" if changes else "")


def gpu_state() -> dict[str, str] | None:
    """Return name, driver, clocks, power and temperature now; None without nvidia-smi."""
    line = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    if line is None or not torch.cuda.is_available():
        return None
    values = line.splitlines()[0].split(", ")
    return dict(zip(GPU_FIELDS, values, strict=False))


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def facts(module: str) -> dict[str, Any]:
    """Return what every record says of itself: device, date, commit, versions, command."""
    return {
        "device": device_name(),
        "date": now().isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "gpu": gpu_state(),
        # Files by their names alone: a record does not tell the folders of a machine.
        "command": " ".join([f"python -m {module}", *(Path(a).name for a in sys.argv[1:])]),
    }


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a record as JSON; a list or object without others inside it stands on one line."""
    text = json.dumps(content, indent=1)
    line = re.compile(r"([\[{])\n\s+([^\[\]{}]*?)\n\s+([\]}])")
    text = line.sub(lambda m: m[1] + re.sub(r"\s*\n\s*", " ", m[2]) + m[3], text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def record_path(prefix: str = "") -> Path:
    """Return the file of today's record of this device."""
    return RESULTS / f"{prefix}{slug(device_name())}-{now():%Y-%m-%d}.json"


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
