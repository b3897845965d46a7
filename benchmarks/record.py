"""Measure this machine and leave a record: `python -m benchmarks.record`.

The record, benchmarks/results/<device>-<date>.json, is written after every stage. A run that ends
early leaves what was measured before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, environment, providers
from benchmarks.measure import MODES
from benchmarks.shapes import CPU_SHAPES, CUDA_SHAPES, LARGE_SHAPE, TINY_SHAPES, Shape
from benchmarks.time_model import sweep, targets
from benchmarks.timing import describe, time_once

POLICY_MODES = ("policy", "policy_sharp", "policy_flat")
SECTIONS = ("accuracy", "sweep", "speed", "memory")

# What a CPU user has.
CPU_PROVIDERS = (
    "plain logits",
    "TRL chunked",
    "Liger GRPO",
    "F.linear_cross_entropy",
    "fastgrpo torch",
    "fastgrpo sparse",
)
# Where 16-bit GEMMs are emulated a peer's call takes minutes. There all providers get these rows.
FEWER_ROWS = {"32k": 256, "152k": 64}
# Left out there: one call takes minutes.
MINUTES_A_CALL = {"152k": ("F.linear_cross_entropy",)}

Stage = tuple[str, str, float, Callable[[], list[dict[str, Any]]]]  # section, label, seconds, work


class Record:
    """A record file in the making."""

    def __init__(self, path: Path, budget: float) -> None:
        self.path = path
        self.budget = budget
        self.begun = time.monotonic()
        self.content: dict[str, Any] = {
            **environment.facts("benchmarks.record"),
            # At the start and now: shares measured on a busy machine are worth little.
            "load_average": [os.getloadavg()[0]] * 2,
            "missing": {},
            "skipped": {},
            "tests": [],
            **{section: [] for section in SECTIONS},
        }

    def remaining(self) -> float:
        return self.budget - (time.monotonic() - self.begun)

    def stage(self, section: str, label: str, needs: float, work: Callable[[], list]) -> None:
        """Add the rows that `work` returns; skip it by name if `needs` seconds are not left."""
        print(f"{self.remaining():5.0f} s left | {section} | {label}", flush=True)
        if self.remaining() < needs:
            self.content["skipped"][f"{section}, {label}"] = "no time left"
        else:
            try:
                self.content[section] += work()
            except Exception as error:  # noqa: BLE001  the run goes on with the next stage
                self.content["skipped"][f"{section}, {label}"] = describe(error)
        self.content["seconds"] = round(time.monotonic() - self.begun)
        self.content["load_average"][1] = os.getloadavg()[0]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def cpu_stages(available: list[providers.Provider], record: Record, quick: bool) -> list[Stage]:
    """Return the stages of a CPU record: the two shapes, forward and backward, fp32 and bf16."""
    device = torch.device("cpu")
    shapes = TINY_SHAPES if quick else CPU_SHAPES
    own = [provider for provider in available if provider.name.startswith("fastgrpo")]
    stages: list[Stage] = []

    def add(section: str, work: Callable, who: list, shape: Shape, dtype: torch.dtype) -> None:
        label = f"{shape.label} {dtype}, {', '.join(provider.name for provider in who)}"
        stages.append((section, label, 10, partial(work, who, shape, dtype, "loss")))

    def add_case(who: list, shape: Shape, dtype: torch.dtype) -> None:
        # Peers are slow where 16-bit GEMMs are emulated: more rounds would tell nothing more.
        share = (0.2 if dtype == torch.float32 else 0.05) * record.budget
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
        stages.extend([("accuracy", label, 10, check), ("speed", label, 10, work)])

    for shape in shapes:
        timed = [p for p in available if p.name not in MINUTES_A_CALL.get(shape.name, ())]
        add_case(timed, shape, torch.float32)
        add_memory(timed, shape, torch.float32)
    for mode in ("half_masked", "half_skipped", "half_zero", "skip_90", *POLICY_MODES):
        add_own(shapes[0], mode)
    reduced = emulates_16_bit_gemms()
    for shape in shapes:
        rows = FEWER_ROWS.get(shape.name, shape.rows) if reduced else shape.rows
        add_case(available, shape._replace(rows=rows), torch.bfloat16)
        if rows < shape.rows:
            add_case(own, shape, torch.bfloat16)
        # Plain 16-bit logits take minutes at full rows where GEMMs are emulated.
        who = [p for p in available if not (reduced and p.name == "plain logits")]
        add_memory(who, shape, torch.bfloat16)
    return stages


def cuda_stages(available: list[providers.Provider], record: Record, quick: bool) -> list[Stage]:
    """Return the stages of a GPU record, what matters most first.

    The order: tests, numerics of every mode, the loss, launch variants, the modes that the targets
    are about, and then the others, as long as there is time.
    """
    device, log = torch.device("cuda"), record.path.with_suffix(".tests.log")
    own = [p for p in available if p.name in ("fastgrpo triton", "fastgrpo sparse")]
    stages: list[Stage] = [
        ("tests", "gpu tests", 60, partial(gpu_tests, log, timeout=0.2 * record.budget))
    ]
    rounds, seconds = (5, 2.0) if quick else (30, 4.0)

    def add_accuracy(who: list, shape: Shape, dtype: torch.dtype, mode: str) -> None:
        work = partial(cases.accuracy, who, shape, dtype, mode, device)
        stages.append(("accuracy", f"{shape.label} {dtype} {mode}", 10, work))

    def add_speed(who: list, shape: Shape, mode: str) -> None:
        # A round of all peers takes half a second at a real head.
        limit = seconds if who is own else 2 * seconds
        case = (who, shape, torch.bfloat16, mode, device)
        work = partial(cases.speed, *case, rounds=rounds, seconds=limit, peaks=True)
        stages.append(("speed", f"{shape.label} {mode}", 10, work))

    def add_sweep(kernel: str, shape: Shape) -> None:
        work = partial(sweep.sweep_launches, kernel, shape, torch.bfloat16, device, seconds=seconds)
        stages.append(("sweep", f"{shape.label} {kernel}", 15, work))

    heads = [shape for shape in CUDA_SHAPES if shape.rows == 4096]
    # The oracle's logits are fp64: a slice of the rows.
    parts = [shape._replace(rows=1024, sequences=2) for shape in heads]
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
        add_speed(own, LARGE_SHAPE, mode)
    for mode in ("frozen", "half_masked", "half_zero"):
        for shape in heads:
            add_speed(available if shape is heads[1] else own, shape, mode)
    for shape in heads:
        add_speed(own, shape, "half_skipped")
    for mode in ("policy_sharp", "policy_flat", "skip_90", "rl", "token_logps"):
        for shape in (heads[0], heads[1]):
            add_speed(available if mode in ("skip_90", "token_logps") else own, shape, mode)
    for shape in CUDA_SHAPES if not quick else ():
        if shape.rows > 4096:
            for mode in ("loss", "logps", "policy"):
                add_speed(own, shape, mode)
    return stages


def gpu_tests(
    log: Path, timeout: float, options: tuple[str, ...] = ("tests/gpu",)
) -> list[dict[str, Any]]:
    """Run the tests that need a GPU; return how they ended, with the end of what they printed.

    The output goes to `log` as it comes, so that a run which is cut off leaves what it has shown.
    Nothing outside tests/gpu is collected: an import that fails elsewhere says nothing about it.
    """
    command = [sys.executable, "-m", "pytest", *options, "-v", "--no-header"]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        running = subprocess.Popen(
            command, cwd=environment.ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            ended = {"exit_code": running.wait(timeout)}
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            ended = {"failure": f"did not finish in {timeout:.0f} s"}
    printed = log.read_text(errors="replace").strip()
    counts = {word: printed.count(f" {word} ") for word in ("PASSED", "FAILED", "ERROR")}
    tail = printed.splitlines()[-20:]
    return [{"command": " ".join(command[1:]), **ended, "counts": counts, "tail": tail}]


def emulates_16_bit_gemms() -> bool:
    """Return whether a bf16 gradient product takes more than four times as long as an fp32 one."""
    grad, weight = torch.randn(64, 4096), torch.randn(4096, 256)
    exact = min(time_once(partial(torch.mm, grad, weight)) for _ in range(3))
    grad, weight = grad.bfloat16(), weight.bfloat16()
    return min(time_once(partial(torch.mm, grad, weight)) for _ in range(3)) > 4 * exact


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540.0, help="seconds (default: 540)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes on a CPU, few on a GPU")
    parser.add_argument("--output", type=Path, help="the record file")
    options = parser.parse_args(arguments)
    record = Record(options.output or environment.record_path(), options.budget)
    on_gpu = torch.cuda.is_available()
    available, missing = providers.load(tuple(providers.LOADERS) if on_gpu else CPU_PROVIDERS)
    record.content["missing"] = missing
    for stage in (cuda_stages if on_gpu else cpu_stages)(available, record, options.quick):
        record.stage(*stage)
    if on_gpu:
        print(targets.table(record.content))
    print(f"wrote {record.path}")
    return record.path


if __name__ == "__main__":
    main()
