"""One side of `benchmarks.train_step` in a process of its own: an answer for each command."""

from __future__ import annotations

import importlib
import json
import sys

import torch

from benchmarks.peak_memory import reset_peak, status_kib
from benchmarks.train_step_case import FULL, TINY, Case, Commands

ANSWER = "answer "  # what else a library prints is not one


def commands() -> Commands:
    """Yield what comes in, one object per line; the peak of memory begins again with each."""
    for line in sys.stdin:
        reset_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        yield json.loads(line)


def answer(found: dict[str, float]) -> None:
    """Send what a command took, with the peak: resident on a CPU, allocated on a GPU."""
    peak = status_kib("VmHWM") / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(ANSWER + json.dumps(found | {"peak_mib": peak}), flush=True)


def main() -> None:
    """Serve the side that the first argument names, with the settings of the second."""
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    case: Case = TINY if settings["rehearse"] else FULL
    side = importlib.import_module(f"benchmarks.train_step_{name}")
    side.serve(case._replace(vocab=settings["vocab"]), settings, commands(), answer)


if __name__ == "__main__":
    main()
