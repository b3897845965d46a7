"""What a run writes and can do without: it goes on where the disk is full or a folder is gone."""

from __future__ import annotations

import sys
from contextlib import suppress
from types import TracebackType

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
