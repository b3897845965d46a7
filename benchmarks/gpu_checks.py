"""Check the kernels on a GPU before anything is measured, each check in a process of its own.

A kernel that hangs, or an error after which a device takes no more calls, ends its own check alone.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.child import run_command
from benchmarks.environment import ROOT
from benchmarks.stages import Record, Stage

DOCTOR = [sys.executable, "-m", "fastgrpo.doctor"]
TESTS = "tests/gpu"
# Beside PATH.
SANITIZER_FOLDER = "/usr/local/cuda/bin"
SANITIZER_FOUND_ERRORS = 9  # an exit code that the program itself does not have
# A test that takes longer hangs: it ends its process, and names its line.
SECONDS_A_TEST = 90
MOST_PROCESSES = 16  # each has a context on the GPU
NEEDS = 10  # seconds: to start Python and a context
TAIL = 50  # lines: the doctor's screen
VERDICTS = ("PASSED", "FAILED", "ERROR", "SKIPPED")

# The doctor and the tests have looked at the kernels. A check at first use would come on top.
UNCHECKED = {"FASTGRPO_SELF_CHECK": "0"}

Row = dict[str, Any]
Check = Callable[[Path, float], Row]  # log, seconds that it may take


def check_stages(record: Record, seconds: float) -> list[Stage]:
    """Return the checks in order, to end within `seconds` of the record's beginning.

    Each has a share of what is left when it begins, so that a short one leaves its rest to the
    others. The grid of surrogates and KL estimators, hundreds of kernels to compile, comes last.
    """
    until = record.begun + seconds
    checks: list[tuple[str, str, float, Check]] = [
        ("doctor", "doctor", 30, doctor),
        ("tests", "without the grid", 35, partial(gpu_tests, "not grid")),
        ("sanitizer", "memcheck", 10, partial(sanitizer, "memcheck")),
        ("sanitizer", "racecheck", 10, partial(sanitizer, "racecheck")),
        ("tests", "grid", 15, partial(gpu_tests, "grid")),
    ]
    stages = []
    for index, (section, label, weight, check) in enumerate(checks):
        share = weight / sum(weight for _, _, weight, _ in checks[index:])
        log = record.path.with_suffix(f".{label.replace(' ', '-')}.log")
        work = partial(_in_time, label, partial(check, log), until, share)
        stages.append(Stage(section, label, NEEDS, work))
    return stages


def _in_time(label: str, check: Callable[[float], Row], until: float, share: float) -> list[Row]:
    return [{"name": label, **check(share * (until - time.monotonic()))}]


def doctor(log: Path, timeout: float) -> Row:
    """Return how `python -m fastgrpo.doctor` ended: with exit code 0 if all is well."""
    return _ended(DOCTOR, log, timeout)


def gpu_tests(marker: str, log: Path, timeout: float) -> Row:
    """Run the tests of tests/gpu with these markers; return how they ended, and what they showed.

    Where pytest-xdist is installed processes share them. A run that is cut off leaves in `log` what
    it has shown, and is counted by it. Nothing outside tests/gpu is collected: an import that fails
    elsewhere says nothing about it.
    """
    command = [sys.executable, "-m", "pytest", TESTS, "-m", marker, "-v", "--no-header"]
    command += ["-o", f"faulthandler_timeout={SECONDS_A_TEST}"]
    command += ["-o", "faulthandler_exit_on_timeout=true"]
    variables = {}
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(len(os.sched_getaffinity(0)), MOST_PROCESSES))]
        variables = {"OMP_NUM_THREADS": "1"}
    row = _ended(command, log, timeout, **variables)
    return row | {"counts": verdicts(log.read_text(errors="replace"))}


def verdicts(printed: str) -> dict[str, int]:
    """Return how many tests have which verdict in what `pytest -v` printed, with -n or without."""
    word = f"({'|'.join(VERDICTS)})"
    # "tests/a.py::test PASSED   [ 5%]", or "[gw0] [  5%] PASSED tests/a.py::test".
    alone = re.compile(rf"^\S+::.* {word}(?: \(.*)? +\[ *\d+%\]$", re.MULTILINE)
    shared = re.compile(rf"^\[gw\d+\] \[ *\d+%\] {word} \S+::", re.MULTILINE)
    found = alone.findall(printed) + shared.findall(printed)
    return {verdict: found.count(verdict) for verdict in VERDICTS}


def sanitizer(tool: str, log: Path, timeout: float) -> Row:
    """Run one small loss under a tool of NVIDIA's compute-sanitizer; return how it ended.

    Raises FileNotFoundError where there is no compute-sanitizer.
    """
    path = os.pathsep.join((os.environ.get("PATH", ""), SANITIZER_FOLDER))
    found = shutil.which("compute-sanitizer", path=path)
    if found is None:
        raise FileNotFoundError(f"no compute-sanitizer on PATH or in {SANITIZER_FOLDER}")
    command = [found, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND_ERRORS)]
    command += [sys.executable, "-m", "benchmarks.small_loss"]
    # An allocation for each tensor: inside PyTorch's pool an address beyond a tensor is valid.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **UNCHECKED}
    return _ended(command, log, timeout, **variables)


def _ended(command: list[str], log: Path, timeout: float, **variables: str) -> Row:
    ended = run_command(command, timeout, log, **variables)
    failed = {"failure": f"did not finish in {timeout:.0f} s"} if ended.exit_code is None else {}
    printed = log.read_text(errors="replace").replace(f"{ROOT}{os.sep}", "").strip()
    return {
        # Files by their names alone: a record does not tell the folders of a machine.
        "command": " ".join(Path(part).name if os.path.isabs(part) else part for part in command),
        "exit_code": ended.exit_code,
        **failed,
        "tail": printed.splitlines()[-TAIL:],
    }
