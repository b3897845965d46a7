"""Measure the memory that one call needs beyond its inputs, gradients included.

On a CPU a library allocates past PyTorch, and only the high-water mark of the resident set sees
all of it. A process has one such mark, so that each figure of a record comes from a fresh
interpreter, `python -m benchmarks.peak_memory`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import providers
from benchmarks.batches import make_batch
from benchmarks.measure import run
from benchmarks.shapes import TINY_SHAPES, Shape

MIB = 1 << 20


def resident_peak_mib(
    provider: str, mode: str, shape: Shape, dtype: torch.dtype, timeout: float
) -> float:
    """Return the peak resident MiB above the inputs of one call in a process of its own.

    Raises ChildProcessError if the child fails, subprocess.TimeoutExpired if it takes too long.
    """
    command = [sys.executable, "-m", "benchmarks.peak_memory", provider, mode]
    command += [str(dtype).removeprefix("torch."), json.dumps(shape)]
    # Freed memory goes back to the kernel at once, so that it is not counted a second time.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    child = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if child.returncode:
        raise ChildProcessError(f"{provider}, {mode}: {child.stderr.strip()[-500:]}")
    return json.loads(child.stdout.splitlines()[-1])["peak_mib"]


def allocated_peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Return the peak of MiB allocated by PyTorch during `call` above what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    # Else the profiler writes two lines to the terminal each time.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = call()
    del result
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak / MIB


def reset_peak() -> None:
    """Let VmHWM begin again at what is resident."""
    Path("/proc/self/clear_refs").write_text("5")


def status_kib(field: str) -> int:
    """Return VmRSS, the resident set, or VmHWM, the highest that it was."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("provider")
    parser.add_argument("mode")
    parser.add_argument("dtype")
    parser.add_argument("shape")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    provider = providers.LOADERS[arguments.provider]()
    mode, device = arguments.mode, torch.device("cpu")
    # Once at a tiny shape: threads, GEMM libraries and imports are not the call's memory.
    run(provider, mode, make_batch(TINY_SHAPES[0], dtype, mode, device))
    batch = make_batch(Shape(*json.loads(arguments.shape)), dtype, mode, device)
    reset_peak()
    before = status_kib("VmRSS")
    run(provider, mode, batch)
    print(json.dumps({"peak_mib": (status_kib("VmHWM") - before) / 1024}))


if __name__ == "__main__":
    _main()
