"""A reward of the user's in a process of its own, which a hanging call does not survive.

    python -m fastgrpo.train.reward_process FILE NAME FD

sends ("ready", None) on the connection FD, and then answers calls of a file's function: it gets its
keyword arguments, and sends ("result", numbers), ("error", text), or ("wrong", text) for what is no
list of numbers.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from typing import Any

from .rewards import Reward, RewardFunction, WrongResult, function_of, numbers_of

PR_SET_PDEATHSIG = 1  # of Linux's prctl
STARTING = 600.0  # seconds that Python, this package and the file may take
# In a row without an answer, after which a reward is lost: five steps that hang or end it.
CALLS = 20


class RewardError(RuntimeError):
    """What a reward raised in its process, or that this has ended."""


class RewardTimeout(RewardError):
    """A reward took too long."""


class RewardEnded(RewardError):
    """The process of a reward has ended, or could not start."""


class RewardLost(RuntimeError):
    """A reward has not answered several calls in a row, of several steps."""


def in_own_process(reward: Reward, limit: float) -> Reward:
    """Return a reward of a file whose function is called in its own process."""
    function = InOwnProcess(reward.file, reward.name, reward.function, limit)
    return replace(reward, function=function)


class InOwnProcess:
    """A reward function that is called in a process of its own, for at most `limit` seconds.

    The process starts with the first call, and keeps what the module keeps. It is killed with all
    that it started when a call takes longer, and a new one starts with the next call. Results are
    lists of what Python can send. The time until the file has been run is not the call's.

    Raises RewardError, RewardTimeout or RewardEnded for a call, and RewardLost after several.
    """

    def __init__(self, file: str, name: str, function: RewardFunction, limit: float) -> None:
        self.file, self.name, self.limit = file, name, limit
        self.__signature__ = inspect.signature(function)
        self._connection: Connection | None = None
        self._unanswered = 0
        self._end = weakref.finalize(self, lambda: None)

    def __call__(self, **given: Any) -> Any:
        if self._unanswered == CALLS:
            raise RewardLost(
                f"reward {self.name}: no answer to {CALLS} calls in a row, each of which took too "
                f"long or ended the process that runs {self.file}"
            )
        self._unanswered += 1
        try:
            if self._connection is None:
                self._start()
            self._connection.send(given)
            kind, result = self._received(self.limit)
        except (EOFError, OSError) as error:
            self.close()
            raise RewardEnded("its process has ended") from error
        except BaseException:  # also Ctrl-C: the answer to this call must not be that to the next
            self.close()
            raise
        self._unanswered = 0
        if kind != "result":
            raise WrongResult(result) if kind == "wrong" else RewardError(result)
        return result

    def close(self) -> None:
        """Kill the process and all that it started, if there is one."""
        self._end()
        self._connection = None

    @property
    def pid(self) -> int | None:
        """The number of the process, if one runs."""
        return None if self._connection is None else self._process.pid

    def _start(self) -> None:
        ours, theirs = Pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, self.file, self.name, str(theirs.fileno())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the training, which ends this process itself
        )
        self._process = process
        theirs.close()
        self._connection = ours
        self._end = weakref.finalize(self, _kill, process, ours)
        self._received(STARTING)

    def _received(self, limit: float) -> tuple[str, Any]:
        if not self._connection.poll(limit):
            raise RewardTimeout(f"no result after {limit:g} seconds")
        return self._connection.recv()


def _kill(process: subprocess.Popen, connection: Connection) -> None:
    connection.close()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended, and all that it started
    process.wait()


def _end_with_training() -> None:
    """Have Linux kill this process when the training is killed: a call that hangs would go on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(file: str, name: str, number: int) -> None:
    """Answer calls until the other end is closed."""
    function, connection, own = function_of(file, name), Connection(number), os.getpid()
    connection.send(("ready", None))
    while True:
        try:
            given = connection.recv()
        except EOFError:
            return
        try:
            answer = ("result", numbers_of(name, function(**given)))
        except WrongResult as error:
            answer = ("wrong", str(error))
        except Exception as error:
            answer = ("error", repr(error))
        if os.getpid() != own:  # a fork that came out of the function: its parent answers
            os._exit(0)
        connection.send(answer)


if __name__ == "__main__":
    _end_with_training()
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
