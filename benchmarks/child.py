"""Run a command that may hang, and end it with all that it has started when its time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from benchmarks import environment

# In the environment of a command and of its descendants: a process group would not have those that
# begin a session of their own, as the doctor's do.
MARK = "BENCHMARKS_CHILD"


class Ended(NamedTuple):
    """How a command ended."""

    exit_code: int | None  # None where its time was up
    seconds: float


def run_command(
    command: list[str], timeout: float, log: Path | None = None, **variables: str
) -> Ended:
    """Run `command` at the root of the clone, with `variables` added to its environment.

    What it prints goes to `log` as it comes, and to the terminal without one. After `timeout`
    seconds it is killed. What it has started and left behind is killed in any case. Raises OSError
    if the command cannot be started.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    mark = uuid.uuid4().hex
    variables = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", MARK: mark} | variables
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        streams = {}
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            streams["stdout"] = stack.enter_context(log.open("w"))
            streams["stderr"] = subprocess.STDOUT
        child = subprocess.Popen(
            command, cwd=environment.ROOT, env=os.environ | variables, **streams
        )
        try:
            code = child.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            child.kill()
            _kill_marked(f"{MARK}={mark}".encode())
            # One that waits inside a driver takes no signal, and is not waited for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(2)
    return Ended(code, time.monotonic() - begun)


def _kill_marked(mark: bytes) -> None:
    """Kill the processes with this in their environment; a second look finds the newest."""
    for _ in range(2):
        for path in Path("/proc").glob("[0-9]*/environ"):
            # Gone meanwhile, or another user's.
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
