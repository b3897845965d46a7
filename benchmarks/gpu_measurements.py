"""Measure on a GPU, or rehearse it: what `benchmarks.record` runs for as long as there is time.

A stage that hangs ends the process, and so does an error after which the device takes no more
calls. Called again, the module goes on with the stage after it.
"""

from __future__ import annotations

import argparse
import faulthandler
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import cases, providers
from benchmarks.measure import MODES
from benchmarks.shapes import CUDA_SHAPES, LARGE_SHAPE, Shape
from benchmarks.stages import Record, Stage
from benchmarks.time_model import sweep
from benchmarks.timing import synced_clock

# A peer's first call may compile for half a minute, and there are a dozen.
SECONDS_A_STAGE = 120.0


class Setting(NamedTuple):
    """Where and at which sizes it is measured."""

    device: torch.device
    heads: tuple[Shape, ...]  # one of a small hidden size, one of a large one, and others
    large: Shape
    more_rows: tuple[Shape, ...]  # of the heads
    rounds: int
    seconds: float  # for our own times in a stage; twice as many where there are peers


FULL = Setting(
    torch.device("cuda"),
    tuple(shape for shape in CUDA_SHAPES if shape.rows == 4096),
    LARGE_SHAPE,
    tuple(shape for shape in CUDA_SHAPES if shape.rows > 4096),
    rounds=30,
    seconds=4.0,
)
SETTINGS = {
    "full": FULL,
    "quick": FULL._replace(more_rows=(), rounds=5, seconds=2.0),
    # On a CPU, in Triton's interpreter.
    "rehearsal": Setting(
        torch.device("cpu"),
        (Shape("narrow", 4, 131, 16, sequences=2), Shape("wide", 4, 131, 32, sequences=2)),
        Shape("large", 8, 131, 32, sequences=4),
        (Shape("narrow", 8, 131, 16, sequences=4),),
        rounds=1,
        seconds=0.0,
    ),
}


def cuda_stages(available: list[providers.Provider], setting: Setting) -> list[Stage]:
    """Return the measurements of a GPU record, what matters most first.

    The order: numerics of every mode, the loss, launch variants, the modes that the targets are
    about, and then the others, as long as there is time.
    """
    device, heads, large, more_rows, rounds, seconds = setting
    own = [p for p in available if p.name in ("fastgrpo triton", "fastgrpo sparse")]
    stages: list[Stage] = []

    def add_accuracy(who: list, shape: Shape, dtype: torch.dtype, mode: str) -> None:
        work = partial(cases.accuracy, who, shape, dtype, mode, device)
        stages.append(Stage("accuracy", f"{shape.label} {dtype} {mode}", 10, work))

    def add_speed(who: list, shape: Shape, mode: str) -> None:
        # A round of all peers takes half a second at a real head.
        limit = seconds if who is own else 2 * seconds
        case = (who, shape, torch.bfloat16, mode, device)
        work = partial(cases.speed, *case, rounds=rounds, seconds=limit, peaks=True)
        stages.append(Stage("speed", f"{shape.label} {mode}", 10, work))

    def add_sweep(kernel: str, shape: Shape) -> None:
        work = partial(sweep.sweep_launches, kernel, shape, torch.bfloat16, device, seconds=seconds)
        stages.append(Stage("sweep", f"{shape.label} {kernel}", 15, work))

    # The oracle's logits are fp64: a slice of the rows.
    parts = [shape._replace(rows=min(shape.rows, 1024), sequences=2) for shape in heads]
    for part in parts:
        add_accuracy(available, part, torch.bfloat16, "loss")
    for mode in MODES:
        if mode != "loss":
            add_accuracy(own, parts[0], torch.bfloat16, mode)
    for mode in ("logps", "loss", "policy"):
        add_accuracy(own, parts[0], torch.float32, mode)
    for shape in heads:
        add_speed(available, shape, "loss")
    for kernel in sweep.CANDIDATES:
        add_sweep(kernel, heads[0] if kernel.endswith("small_h") else heads[1])
    for mode in ("logps", "policy"):
        for shape in heads:
            add_speed(available if mode == "logps" else own, shape, mode)
    for mode in ("loss", "frozen", "policy"):
        add_speed(own, large, mode)
    for mode in ("frozen", "half_masked", "half_zero"):
        for shape in heads:
            add_speed(available if shape is heads[1] else own, shape, mode)
    for shape in heads:
        add_speed(own, shape, "half_skipped")
    for mode in ("policy_sharp", "policy_flat", "skip_90", "rl", "token_logps"):
        for shape in (heads[0], heads[1]):
            add_speed(available if mode in ("skip_90", "token_logps") else own, shape, mode)
    for shape in more_rows:
        for mode in ("loss", "logps", "policy"):
            add_speed(own, shape, mode)
    return stages


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="the record file")
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("until", type=float, help="time.monotonic() at which to end")
    options = parser.parse_args(arguments)
    faulthandler.dump_traceback_later(SECONDS_A_STAGE, exit=True)
    record = Record(options.path, options.until - time.monotonic())
    available, record.content["missing"] = providers.load()
    work_through(record, cuda_stages(available, SETTINGS[options.setting]))


def work_through(
    record: Record, stages: list[Stage], seconds_a_stage: float = SECONDS_A_STAGE
) -> None:
    """Run the stages that the record does not have yet; end the process in one that hangs.

    Raises the error after which a device takes no more calls.
    """
    for stage in record.waiting(stages):
        limit = min(seconds_a_stage, record.remaining())
        faulthandler.dump_traceback_later(max(limit, 1.0), exit=True)
        record.run(stage)
        synced_clock()
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
