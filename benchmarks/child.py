"""Run a command that may hang: in a process group of its own, which ends when its time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import environment


class Ended(NamedTuple):
    """How a command ended."""

    exit_code: int | None  # None where its time was up
    seconds: float


def run_group(
    command: list[str], timeout: float, log: Path | None = None, **variables: str
) -> Ended:
    """Run `command` at the root of the clone, with `variables` added to its environment.

    What it prints goes to `log` as it comes, and to the terminal without one. After `timeout`
    seconds it is killed. What it has started is killed in any case, unless it is a group of its
    own. Raises OSError if the command cannot be started.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    variables = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | variables
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        streams = {}
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            streams["stdout"] = stack.enter_context(log.open("w"))
            streams["stderr"] = subprocess.STDOUT
        child = subprocess.Popen(
            command,
            cwd=environment.ROOT,
            env=os.environ | variables,
            start_new_session=True,
            **streams,
        )
        try:
            code = child.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            # One that waits inside a driver takes no signal, and is not waited for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(2)
    return Ended(code, time.monotonic() - begun)
