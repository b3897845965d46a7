"""Ctrl-C, SIGTERM and SIGHUP, delayed until a safe point."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from . import ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """Context in which a first signal to end only sets ``signum``; a second ends the process.

    ``safe_point()`` raises KeyboardInterrupt if a signal has come. Call it where nothing is half
    done. A signal that the process ignores, such as SIGHUP under nohup, stays ignored. Outside of
    the main thread, where Python takes no signals, all stay as they are.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> Interrupt:
        self._previous: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            heeded = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
            self._previous = {s: signal.signal(s, self._note) for s in heeded}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def safe_point(self) -> None:
        """Raise KeyboardInterrupt if a signal has come, to whichever process."""
        self.signum = max(ranks.gathered(self.signum))
        if self.signum:
            raise KeyboardInterrupt

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
        # Not print(): the signal may have come in the middle of one.
        os.write(2, b"\nfinishing the step, then saving; once more to quit at once\n")
