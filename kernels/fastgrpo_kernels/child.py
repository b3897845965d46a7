"""A process of its own for what may hang or end a process: a compiler, a driver, a new kernel."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

_PR_SET_PDEATHSIG = 1
_running: set[subprocess.Popen] = set()


class Ended(NamedTuple):
    """How a process ended."""

    status: int | None  # below 0: of a signal; None: it did not end in time, or not start
    failure: str  # "was ended by SIGABRT", say; "" if its status was 0
    lines: list[str]  # what it printed, without empty lines

    timed_out: bool = False

    @property
    def last_line(self) -> str:
        return self.lines[-1][:1000] if self.lines else "nothing"


def run_python(
    arguments: Sequence[str], seconds: float, variables: Mapping[str, str] | None = None
) -> Ended:
    """Run this Python with arguments, and what it starts, for at most so many seconds.

    It has the module path of this process, and its environment with `variables`.
    """
    try:
        # A file: whatever held on to a pipe could keep this process waiting.
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            status = _run([sys.executable, *arguments], seconds, variables or {}, output)
            output.seek(0)
            lines = [line.strip() for line in output if line.strip()]
    except OSError as error:
        return Ended(None, f"did not start: {error}", [])
    if status is None:
        return Ended(None, f"did not end within {seconds:g} s", lines, timed_out=True)
    if status < 0:
        known = -status in {*signal.Signals}
        name = signal.Signals(-status).name if known else f"signal {-status}"
        return Ended(status, f"was ended by {name}", lines)
    return Ended(status, f"ended with status {status}" if status else "", lines)


def _run(
    command: list[str], seconds: float, variables: Mapping[str, str], output: IO[str]
) -> int | None:
    """Run a command and return its status; None if it had to be ended."""
    process = subprocess.Popen(
        command,
        env=_environment() | dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    _running.add(process)
    try:
        return process.wait(seconds)
    except BaseException as error:  # no Ctrl-C reaches a session of its own
        _kill(process)
        # A process that hangs inside the driver may not even end when it is killed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise
    finally:
        _running.discard(process)


def end_all() -> None:
    """End all that `run_python` has started, in whatever thread it waits."""
    for process in list(_running):
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends. On Linux; no effect elsewhere.

    A process that hangs would otherwise outlive a parent that was killed.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """That of this process, with its module path: the child is to have these very packages."""
    folders = [folder or os.getcwd() for folder in sys.path if isinstance(folder, str)]
    # `python -m` would put the working directory first.
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}
