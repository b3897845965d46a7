"""Ctrl-C and SIGTERM, delayed until a safe point."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Interrupt:
    """Context in which a first SIGINT or SIGTERM only sets ``signum``; a second ends the process.

    ``safe_point()`` raises KeyboardInterrupt if a signal has come. Call it where nothing is half
    done.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> Interrupt:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def safe_point(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.signum:
            raise KeyboardInterrupt

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
        # Not print(): the signal may have come in the middle of one.
        os.write(2, b"\nfinishing the step, then saving; once more to quit at once\n")
