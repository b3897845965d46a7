"""The stages of a record, and the file that they fill."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import environment
from benchmarks.timing import describe

SECTIONS = ("doctor", "tests", "sanitizer", "accuracy", "sweep", "speed", "conditions", "memory")
NO_TIME = "no time left"


class Stage(NamedTuple):
    """A piece of work that adds rows to a section."""

    section: str
    label: str  # one of its kind in the section
    needs: float  # seconds without which it is not begun
    work: Callable[[], list[dict[str, Any]]]

    @property
    def name(self) -> str:
        return f"{self.section}, {self.label}"


class Record:
    """A record file in the making; one that exists is gone on with.

    The file is right at any moment, for a process may end in any call. A stage counts as skipped
    until it has ended, and `running` names the one in work. `stages` has the seconds of those that
    have ended; they are not begun again. `warnings` has each warning with the first stage that gave
    it: that other kernels run than the one asked for, say. Raises ValueError if the file is no
    record, or one of another device or commit.
    """

    def __init__(self, path: Path, budget: float) -> None:
        self.path = path
        self.budget = budget  # seconds
        self.begun = time.monotonic()
        self.content: dict[str, Any] = {
            **environment.facts("benchmarks.record"),
            # At the start and now: shares measured on a busy machine are worth little.
            "load_average": [os.getloadavg()[0]] * 2,
            "missing": {},
            "skipped": {},
            "stages": {},
            "running": None,
            "warnings": {},
            **{section: [] for section in SECTIONS},
        }
        if path.exists():
            found = _read(path)
            if _origin(found) != _origin(self.content):
                here, there = _origin(self.content), _origin(found)
                raise ValueError(f"{path.name}: expected a record of {here}, got one of {there}")
            self.content |= found | {"running": None}

    def remaining(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.budget - (time.monotonic() - self.begun)

    def waiting(self, stages: Iterable[Stage]) -> list[Stage]:
        """Return the stages that have not ended yet, all of them named as skipped."""
        found = [stage for stage in stages if stage.name not in self.content["stages"]]
        self.content["skipped"] |= {stage.name: NO_TIME for stage in found}
        self.write()
        return found

    def run(self, stage: Stage) -> None:
        """Add the rows of a stage, or the reason why there are none; skip it without its time."""
        print(f"{self.remaining():5.0f} s left | {stage.section} | {stage.label}", flush=True)
        if self.remaining() < stage.needs:
            return
        self.content["running"] = stage.name
        self.write()
        begun = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            try:
                self.content[stage.section] += stage.work()
                del self.content["skipped"][stage.name]
            except Exception as error:  # noqa: BLE001  the run goes on with the next stage
                self.content["skipped"][stage.name] = describe(error)
        for warning in caught:
            self.content["warnings"].setdefault(str(warning.message)[:300], stage.name)
        self.end(time.monotonic() - begun)

    def end(self, seconds: float) -> None:
        """Note that the running stage has ended, after so many seconds."""
        self.content["stages"][self.content["running"]] = round(seconds, 1)
        self.content["running"] = None
        self.write()

    def reload(self) -> None:
        """Take over what another process has written."""
        self.content = json.loads(self.path.read_text())

    def write(self) -> None:
        """Write the file anew, whole or not at all."""
        self.content["load_average"][1] = os.getloadavg()[0]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        unfinished.replace(self.path)


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a record; a file that is none raises ValueError."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # JSON's errors, and those of its bytes
        raise ValueError(f"{path.name}: expected a record, got what is no JSON: {error}") from None
    fields = ("device", "commit", "stages", "skipped")
    if not isinstance(content, dict) or not content.keys() >= set(fields):
        raise ValueError(f"{path.name}: expected a record, with {fields}, got {str(content)[:80]}")
    return content


def _origin(content: dict[str, Any]) -> str:
    """Return device and commit; the record itself may be what changes the tree."""
    return f"{content['device']} at {str(content['commit']).removesuffix('+changes')}"
