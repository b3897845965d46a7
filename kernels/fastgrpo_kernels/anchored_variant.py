"""Which variant of the anchored kernel runs: the launch table, a switch, and a trial.

The warp-specialised variant must be asked for, with FASTGRPO_WARP_SPECIALIZE=1. What could go wrong
with it is a race, a deadlock, or a compiler that ends the process. So its first use on a device
waits for a child process, `warp_trial`, and the flattened variant runs unless that one says it may.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from typing import IO

import torch
from torch import Tensor

from .runtime import (
    ANCHORED_SMALL_H,
    LAUNCHES,
    Launch,
    architecture,
    capturing,
    launch_for,
    switch,
)

SWITCH = "FASTGRPO_WARP_SPECIALIZE"
TRIAL = ("-m", "fastgrpo_kernels.warp_trial")  # arguments of the interpreter; a device follows
SECONDS = 120.0  # a trial compiles 20 kernels, about 2 s each
PASSED = "the specialised warps passed their trial"  # a line that the trial prints

_REFUSED: dict[torch.device, str] = {}  # why a device must not specialise warps, or ""


def anchored_launch(hidden: Tensor, scores_only: bool) -> Launch:
    """The launch entry for these operands and this mode."""
    asked_for = switch(SWITCH, default=False)
    arch = architecture(hidden.device)
    flattened = launch_for("anchored_logps", 16, arch)
    specialised = LAUNCHES["anchored_logps_small_h"].get((16, arch))
    has_entry = specialised is not None and hidden.shape[1] <= ANCHORED_SMALL_H
    if not (asked_for and scores_only and has_entry):
        return flattened
    device = hidden.device
    if device not in _REFUSED:
        if capturing(device):  # the next launch outside of a capture has the trial
            return flattened
        _REFUSED[device] = refusal(device)
        if _REFUSED[device]:
            warnings.warn(
                f"fastgrpo: no warp specialisation on {device}, {_REFUSED[device]}; the flattened"
                " kernel runs instead",
                RuntimeWarning,
                stacklevel=2,
            )
    return flattened if _REFUSED[device] else specialised


def refusal(device: torch.device) -> str:
    """Say why warps must not be specialised on a device; "" if they may. Runs the trial."""
    try:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            status = _run([sys.executable, *TRIAL, str(device)], output)
            output.seek(0)
            lines = [line.strip() for line in output if line.strip()]
    except subprocess.TimeoutExpired:
        return f"its trial did not end within {SECONDS:g} s"
    except OSError as error:
        return f"its trial did not start: {error}"
    if status < 0:
        name = signal.Signals(-status).name
        return f"the compiler or driver ended the process of its trial with {name}"
    if status == 0 and PASSED in lines:
        return ""
    said = lines[-1][:1000] if lines else "nothing"
    return f"its trial (status {status}) said: {said}"


def _run(command: list[str], output: IO[str]) -> int:
    """Run a command and return its status. It ends within SECONDS, with all that it started.

    The output is a file: whatever held on to a pipe could keep this process waiting.
    """
    child = subprocess.Popen(
        command,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return child.wait(SECONDS)
    except BaseException:  # no Ctrl-C reaches a session of its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        # A process that hangs inside the driver may not even end when it is killed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(10)
        raise


def _environment() -> dict[str, str]:
    """That of this process, with its module path: the trial is to try this very package."""
    folders = [folder or os.getcwd() for folder in sys.path if isinstance(folder, str)]
    # `python -m` would put the working directory first.
    path = {"PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}
    return os.environ | path | {SWITCH: "0"}
