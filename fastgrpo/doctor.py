"""What runs on this machine, and whether it is right: `python -m fastgrpo.doctor`.

Versions, devices, which kernels each call takes and why, and the errors of a self-test. Every
kernel is tried in a child process with a time limit, so that one that hangs hangs nothing else. It
fills Triton's cache, and stores the verdicts that `backend="auto"` reads. (The anchored kernel is
compiled for each hidden size: a model's first call still does that.) The status is 1 if something
is wrong.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

import fastgrpo
from fastgrpo.dispatch import choice, verdicts
from fastgrpo.dispatch.choice import Route
from fastgrpo.dispatch.self_check import MODES, Figure, complaint
from fastgrpo.dispatch.trial import FAULT
from fastgrpo_kernels import anchored_variant
from fastgrpo_kernels.child import end_all, run_python
from fastgrpo_kernels.runtime import (
    HAS_TRITON,
    INTERPRETED,
    LAUNCHES,
    architecture,
    obstacle,
    switch,
    triton,
)

SECONDS = 120.0  # of a child process
PACKAGES = ("numpy", "transformers", "flash-attn")
PEERS = ("trl", "liger-kernel", "verl", "unsloth", "quack-kernels", "cut-cross-entropy")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIXTEEN_BITS = ((BF16, BF16), (FP16, FP16))
OPERANDS = (*SIXTEEN_BITS, (FP32, FP32), (BF16, FP32), (FP16, FP32), ())
# Columns of the table, and how the names of the figures in them begin.
COLUMNS = {
    "log-probs": ("logps", "lse"),
    "entropy": ("entropy",),
    "dhidden": ("dhidden in", "row of dhidden in"),
    "dweight": ("dweight in", "row of dweight in"),
    "sparse": ("dhidden sparse", "dweight sparse"),
    "support": (
        "support",
        "dhidden support",
        "dweight support",
        "row of dhidden support",
        "row of dweight support",
    ),
    "per token": ("token_loss", "segment_reduce", "group_stats"),
}


class Trial(NamedTuple):
    """Some kernels on a device, with what their self-test found."""

    device: torch.device
    kernels: str  # "anchored", "portable" or "torch"
    dtypes: tuple[torch.dtype, ...]  # of hidden and weight; empty: what takes numbers per token
    figures: tuple[Figure, ...] = ()
    failure: str = ""  # how the child process ended, if not well
    decided: bool = True  # whether this says something about the kernels
    seconds: float = 0.0

    @property
    def operands(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        return ", head ".join(dict.fromkeys(names)) or "no head"

    def reason(self, modes: tuple[str, ...] = MODES) -> str:
        """Return why these kernels must not run in one of these modes; "" if they may."""
        if self.failure:
            return f"the self-test {self.failure}"
        others = set(MODES) - {"dense", *modes}
        held = [x for x in self.figures if others.isdisjoint(x.name.split())]
        return complaint([figure for figure in held if not figure.holds])


def main() -> int:
    problems = []
    print(_versions())
    try:
        asked = choice.named("auto")
    except ValueError as error:
        print(f"\nWRONG: {error}")
        return 1
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if os.path.exists("/dev/nvidia0") and not torch.cuda.is_available() and not hidden:
        problems.append(f"there is a GPU, but torch {torch.__version__} cannot use it")
    if asked == "triton" and not torch.cuda.is_available():
        problems.append(f"FASTGRPO_BACKEND=triton: {obstacle(torch.device('cpu'))}")
    for device in _devices():
        print(f"\n{device}  {_describe(device)}\n{_head_of_table()}", flush=True)
        trials = []
        for trial in _run_all(_planned(device)):
            trials.append(trial)
            print(_row(trial, trial in _taken(trials, asked)), flush=True)
            _store(trial)
            if reason := trial.reason():
                problems.append(f"{trial.kernels}, {trial.operands} on {device}: {reason}")
        print(_why(device, asked))
        if not obstacle(device) and anchored_variant.specialises_warps(device):
            if reason := anchored_variant.refusal(device):
                problems.append(f"specialised warps on {device}: {reason}")
    print("\n" + "\n".join(_caches(problems)))
    print("\n" + ("\n".join(f"WRONG: {problem}" for problem in problems) or "Nothing is wrong."))
    return int(bool(problems))


# ---- what is here ------------------------------------------------------------------------------


def _versions() -> str:
    def found(names: tuple[str, ...]) -> str:
        versions = {name: _version(name) for name in names}
        return "  ".join(f"{name} {version or 'no'}" for name, version in versions.items())

    own = f"fastgrpo {fastgrpo.__version__}  python {platform.python_version()}"
    triton_version = triton.__version__ if HAS_TRITON else "no"
    settings = {name: x for name, x in os.environ.items() if name.startswith("FASTGRPO_")}
    return "\n".join([
        f"{own}  torch {torch.__version__}  triton {triton_version}  {found(PACKAGES)}",
        f"peers     {found(PEERS)}",
        f"settings  {'  '.join(f'{name}={x}' for name, x in settings.items()) or 'none'}",
    ])  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[torch.device]:
    """Return the first device of each kind, and the CPU."""
    kinds = {}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            kinds.setdefault(torch.cuda.get_device_name(index), torch.device("cuda", index))
    return [*kinds.values(), torch.device("cpu")]


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    facts = torch.cuda.get_device_properties(device)
    return (
        f"{facts.name}, compute capability {facts.major}.{facts.minor},"
        f" {facts.multi_processor_count} multiprocessors, {facts.total_memory / 2**30:.0f} GiB"
    )


def _caches(problems: list[str]) -> list[str]:
    """Return a line for each cache; one that cannot be written is a problem where it is needed."""
    lines = []
    if HAS_TRITON and not INTERPRETED:
        folder = Path(triton.knobs.cache.dir)
        lines.append(f"compiled kernels  {folder}, {sum(1 for _ in folder.glob('*/*.json'))} files")
        if torch.cuda.is_available() and not _writable(folder):
            problems.append(f"Triton's cache {folder} cannot be written")
    folder = verdicts.folder()
    if folder is None or not _writable(folder):
        return [*lines, f"verdicts          {folder} cannot be written: each process checks again"]
    return [*lines, f"verdicts          {folder}"]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# ---- the self-test -----------------------------------------------------------------------------


def _planned(device: torch.device) -> list[Trial]:
    """Return what is to be tried: all that a call may take on the device, the best first."""
    trials = []
    for dtypes in OPERANDS:
        trials += [Trial(device, name, dtypes) for name in _kernels(device, dtypes)]
    return trials


def _kernels(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Return what there is for these operands, the best first."""
    if obstacle(device) or INTERPRETED:
        return ["torch"]
    if dtypes in SIXTEEN_BITS and (16, architecture(device)) in LAUNCHES["anchored_logps"]:
        return ["anchored", "portable", "torch"]
    return ["portable", "torch"]


def _run_all(trials: list[Trial]) -> Iterator[Trial]:
    """Run each trial in a process of its own, several at a time; yield them in order."""
    with ThreadPoolExecutor(max(1, min(8, len(os.sched_getaffinity(0)) // 2))) as pool:
        try:
            yield from pool.map(_run, trials)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise


def _run(trial: Trial) -> Trial:
    begun = time.monotonic()
    names = [str(dtype).removeprefix("torch.") for dtype in trial.dtypes]
    command = ["-m", "fastgrpo.dispatch.trial", str(trial.device), trial.kernels, *names]
    ended = run_python(command, SECONDS)
    figures = tuple(Figure(**json.loads(line)) for line in ended.lines if line.startswith('{"name'))
    failure = ended.failure
    if failure:
        after = f" after {figures[-1].name}" if figures else ""
        failure = f"{failure}{after}; its last line: {ended.last_line}"
    # A kernel that hangs, or brings its process down. The rest are accidents: no memory, no file.
    decided = ended.status in (0, FAULT, -signal.SIGABRT, -signal.SIGSEGV) or ended.timed_out
    seconds = time.monotonic() - begun
    return trial._replace(figures=figures, failure=failure, decided=decided, seconds=seconds)


def _store(trial: Trial) -> None:
    """Keep the verdicts, so that no call checks the same again, or hangs where this did."""
    if trial.kernels == "torch" or not trial.decided:
        return
    for mode in MODES if trial.dtypes else ("dense",):
        route = Route(trial.device, trial.dtypes, mode, trial.kernels == "anchored")
        verdicts.store(verdicts.facts(trial.device, route.name), trial.reason((mode,)))


# ---- what follows from it ----------------------------------------------------------------------


def _taken(trials: list[Trial], asked: str) -> set[Trial]:
    """Return what `backend="auto"` takes for each kind of operands, as `choice.choose` decides."""
    taken, wrong = {}, set()
    for trial in trials:
        if trial.kernels == "torch":
            if asked != "triton":
                taken.setdefault(trial.dtypes, trial)
            continue
        left_out = trial.kernels == "anchored" and not switch("FASTGRPO_ANCHORED", True)
        if asked == "torch" or left_out or trial.dtypes in wrong:
            continue
        if not trial.reason(("dense",)):
            taken.setdefault(trial.dtypes, trial)
        elif trial.decided:
            wrong.add(trial.dtypes)
    return set(taken.values())


def _head_of_table() -> str:
    names = "".join(f"{name:>10}" for name in COLUMNS)
    return f"  {'operands':23}{'kernels':8}{names}{'s':>6}"


def _row(trial: Trial, taken: bool) -> str:
    mark = "*" if taken else " "
    cells = "".join(f"{_cell(trial, begins):>10}" for begins in COLUMNS.values())
    return f"{mark} {trial.operands:23}{trial.kernels:8}{cells}{trial.seconds:6.1f}"


def _cell(trial: Trial, begins: tuple[str, ...]) -> str:
    """Return the largest error of a column, marked where it is more than is allowed."""
    figures = [figure for figure in trial.figures if figure.name.startswith(begins)]
    if not figures:
        return "-"
    worst = max(figures, key=lambda figure: (math.isnan(figure.error), figure.error / figure.bar))
    return f"{worst.error:.0e}{'' if all(figure.holds for figure in figures) else ' !'}"


def _why(device: torch.device, asked: str) -> str:
    """Say in a line what calls take, and why."""
    if asked == "torch":
        return "* taken by calls: torch, as FASTGRPO_BACKEND says"
    if reason := obstacle(device):
        taken = "nothing, FASTGRPO_BACKEND=triton" if asked == "triton" else "torch"
        return f"* taken by calls: {taken}; {reason.partition(';')[0]}"
    if INTERPRETED:
        return "* taken by calls: torch; the kernels are interpreted (TRITON_INTERPRET=1)"
    anchored = "H % 8 == 0" if switch("FASTGRPO_ANCHORED", True) else "not by FASTGRPO_ANCHORED=0"
    return f"* taken by calls: the first that passed for their dtypes (anchored: {anchored})"


if __name__ == "__main__":
    sys.exit(main())
