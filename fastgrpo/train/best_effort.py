"""What a run writes and can do without: it goes on where the disk is full or a folder is gone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm


class BestEffort:
    """Context around writes that may fail: the first error is said on stderr, and none is raised.

    It can be entered again and again. ``failed`` is whether an error has come.
    """

    def __init__(self, name: str) -> None:
        self.name, self.failed = name, False

    def __enter__(self) -> BestEffort:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        if not self.failed:
            self.failed = True
            say(f"{self.name} could not be written, all else goes on: {error!r}")
        return True


def say(message: str) -> None:
    """Print a line on stderr, above the progress bar; not where that is a full disk itself."""
    with suppress(OSError):
        tqdm.write(message, file=sys.stderr)


@contextmanager
def lasting_console() -> Iterator[None]:
    """Context in which printing raises nothing: not on a full disk, nor where nobody reads."""
    with (
        redirect_stdout(_Lasting(sys.stdout, "stdout")),
        redirect_stderr(_Lasting(sys.stderr, "stderr")),
    ):
        yield


class _Lasting:
    """A stream that leaves out what it cannot write."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._effort = stream, BestEffort(name)

    def write(self, text: str) -> int:
        with self._effort:
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._effort:
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
