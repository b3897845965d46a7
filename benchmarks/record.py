"""Measure this machine and leave a record: `python -m benchmarks.record`.

The record, benchmarks/results/<device>-<date>.json, is written before and after every stage. A run
that ends early leaves what was measured before, and says in which stage it ended. With a GPU the
checks come first (doctor, GPU tests, compute-sanitizer), then the measurements, each in processes
of their own; what they print lies beside the record.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import cases, environment, providers
from benchmarks.child import run_command
from benchmarks.conditions import CONDITIONS
from benchmarks.gpu_checks import UNCHECKED, check_stages
from benchmarks.shapes import CPU_SHAPES, TINY_SHAPES, Shape
from benchmarks.stages import Record, Stage
from benchmarks.time_model import targets
from benchmarks.timing import time_once

POLICY_MODES = ("policy", "policy_sharp", "policy_flat")

# What a CPU user has.
CPU_PROVIDERS = (
    "plain logits",
    "TRL chunked",
    "Liger GRPO",
    "F.linear_cross_entropy",
    "fastgrpo torch",
    "fastgrpo sparse",
)
# The others take twice as long and more: under every condition they would be slower still.
FASTEST_PROVIDERS = ("plain logits", "Liger GRPO", "fastgrpo torch", "fastgrpo sparse")
# Where 16-bit GEMMs are emulated a peer's call takes minutes. There all providers get these rows.
FEWER_ROWS = {"32k": 256, "152k": 64}
# Left out there: one call takes minutes.
MINUTES_A_CALL = {"152k": ("F.linear_cross_entropy",)}

# Of the budget, where measurements follow them: a cold compile cache takes it all.
SHARE_OF_CHECKS = 0.7
MEASURE = [sys.executable, "-m", "benchmarks.gpu_measurements"]
# To start a process that measures, and to write what it was doing when its time was up.
SECONDS_TO_START, SECONDS_TO_END = 20, 5


def cpu_stages(available: list[providers.Provider], record: Record, quick: bool) -> list[Stage]:
    """Return the stages of a CPU record: loss and gradients, fp32 and bf16."""
    device = torch.device("cpu")
    shapes = TINY_SHAPES if quick else CPU_SHAPES
    own = [provider for provider in available if provider.name.startswith("fastgrpo")]
    stages: list[Stage] = []

    def add(section: str, work: Callable, who: list, shape: Shape, dtype: torch.dtype) -> None:
        label = f"{shape.label} {dtype}, {', '.join(provider.name for provider in who)}"
        stages.append(Stage(section, label, 10, partial(work, who, shape, dtype, "loss")))

    def add_case(who: list, shape: Shape, dtype: torch.dtype) -> None:
        # Peers are slow where 16-bit GEMMs are emulated: more rounds would tell nothing more.
        share = (0.16 if dtype == torch.float32 else 0.05) * record.budget
        add("accuracy", partial(cases.accuracy, device=device), who, shape, dtype)
        speed = partial(cases.speed, device=device, rounds=9, seconds=share, peaks=False)
        add("speed", speed, who, shape, dtype)

    def add_memory(who: list, shape: Shape, dtype: torch.dtype) -> None:
        for provider in who:
            timeout = max(0.1 * record.budget, 30)
            add("memory", partial(cases.memory, timeout=timeout), [provider], shape, dtype)

    def add_own(shape: Shape, mode: str) -> None:
        label = f"{shape.label} {mode}, {', '.join(provider.name for provider in own)}"
        part = shape._replace(rows=min(shape.rows, 512))
        check = partial(cases.accuracy, own, part, torch.float32, mode, device)
        case = (own, shape, torch.float32, mode, device)
        work = partial(cases.speed, *case, rounds=9, seconds=0.03 * record.budget, peaks=False)
        stages.append(Stage("accuracy", label, 10, check))
        stages.append(Stage("speed", label, 10, work))

    for shape in shapes:
        timed = [p for p in available if p.name not in MINUTES_A_CALL.get(shape.name, ())]
        add_case(timed, shape, torch.float32)
        add_memory(timed, shape, torch.float32)
    for condition in CONDITIONS:
        who = [provider for provider in available if provider.name in FASTEST_PROVIDERS]
        label = f"{shapes[0].label}, {condition}, {', '.join(provider.name for provider in who)}"
        seconds = 0.06 * record.budget
        work = partial(cases.conditioned, condition, who, shapes[0], device, 9, seconds)
        stages.append(Stage("conditions", label, 10, work))
    for mode in ("half_masked", "half_skipped", "half_zero", "skip_90", *POLICY_MODES):
        add_own(shapes[0], mode)
    for shape in shapes[1:]:
        add_own(shape, "policy")
    reduced = emulates_16_bit_gemms()
    for shape in dict.fromkeys((shapes[0], shapes[-1])):
        rows = FEWER_ROWS.get(shape.name, shape.rows) if reduced else shape.rows
        add_case(available, shape._replace(rows=rows), torch.bfloat16)
        if rows < shape.rows:
            add_case(own, shape, torch.bfloat16)
        # Plain 16-bit logits take minutes at full rows where GEMMs are emulated.
        who = [p for p in available if not (reduced and p.name == "plain logits")]
        add_memory(who, shape, torch.bfloat16)
    return stages


def emulates_16_bit_gemms() -> bool:
    """Return whether a bf16 gradient product takes more than four times as long as an fp32 one."""
    grad, weight = torch.randn(64, 4096), torch.randn(4096, 256)
    exact = min(time_once(partial(torch.mm, grad, weight)) for _ in range(3))
    grad, weight = grad.bfloat16(), weight.bfloat16()
    return min(time_once(partial(torch.mm, grad, weight)) for _ in range(3)) > 4 * exact


def gpu_session(record: Record, half: str | None, setting: str, measure: list[str]) -> None:
    """Check, then measure, or one of the two; `measure` is the command that measures.

    The process ends at the end of the budget, wherever it is.
    """
    faulthandler.dump_traceback_later(record.remaining(), exit=True)
    try:
        if half != "measurements":
            share = 1.0 if half == "checks" else SHARE_OF_CHECKS
            checks = check_stages(record, share * record.budget - SECONDS_TO_END)
            for stage in record.waiting(checks):
                record.run(stage)
        if half != "checks":
            measure_in_processes(record, [*measure, str(record.path), setting])
    finally:
        faulthandler.cancel_dump_traceback_later()


def measure_in_processes(record: Record, command: list[str]) -> None:
    """Run `command`, with the moment at which to end, until it has gone through its stages.

    Its process may end before: in a stage that hangs, or that takes its process with it. Then a
    new one goes on with the next stage.
    """
    record.content["skipped"].pop("measurements", None)
    record.write()
    while record.remaining() > SECONDS_TO_START:
        before = len(record.content["stages"])
        until = time.monotonic() + record.remaining() - SECONDS_TO_END
        # It ends itself at that moment. A second later it is killed.
        timeout = until - time.monotonic() + 1
        code, _ = run_command([*command, str(until)], timeout, **UNCHECKED)
        record.reload()
        if code == 0 or record.remaining() < SECONDS_TO_START:
            return
        reason = f"its process ended with exit code {code}"
        if record.content["running"] is not None:
            record.content["skipped"][record.content["running"]] = reason
            record.end(time.time() - record.path.stat().st_mtime)
        elif len(record.content["stages"]) == before:
            record.content["skipped"]["measurements"] = reason
            record.write()
            return


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540.0, help="seconds (default: 540)")
    help = "the record file; one that exists is gone on with"
    parser.add_argument("--output", type=Path, help=help)
    help = "of a GPU session this half; a call with the same --output adds the other"
    parser.add_argument("--stages", choices=("checks", "measurements"), help=help)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="tiny shapes on a CPU, few on a GPU")
    help = "a GPU session at tiny shapes on the CPU; needs TRITON_INTERPRET=1"
    size.add_argument("--rehearse", action="store_true", help=help)
    options = parser.parse_args(arguments)
    on_gpu = options.rehearse or torch.cuda.is_available()
    if options.stages and not on_gpu:
        parser.error("--stages: expected a GPU or --rehearse")
    if options.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--rehearse: expected TRITON_INTERPRET=1 in the environment")
    if (options.stages or options.rehearse) and options.output is None:
        parser.error("--output: expected with --stages and --rehearse")
    if options.output is None:
        environment.record_path().unlink(missing_ok=True)  # measured anew
    try:
        record = Record(options.output or environment.record_path(), options.budget)
    except ValueError as error:
        parser.error(f"--output: {error}")
    if on_gpu:
        setting = "rehearsal" if options.rehearse else "quick" if options.quick else "full"
        gpu_session(record, options.stages, setting, MEASURE)
        if record.content["speed"]:
            print(targets.table(record.content))
    else:
        available, record.content["missing"] = providers.load(CPU_PROVIDERS)
        for stage in record.waiting(cpu_stages(available, record, options.quick)):
            record.run(stage)
    print(f"wrote {record.path}")
    return record.path


if __name__ == "__main__":
    main()
