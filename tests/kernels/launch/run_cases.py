"""Launch cases on the stand-in driver: `python -m tests.kernels.launch.run_cases sm_90 usual`.

One line of JSON per case: its name, the error or "", the entries of the launch tables and the
kernels that the driver took. In a process that `stand_in.environment` made.
"""

from __future__ import annotations

import json
import sys

from fastgrpo_kernels.runtime import LAUNCHES, Launch
from tests.kernels.launch.cases import anchored_thoroughly, usual
from tests.kernels.launch.planted import planted
from tests.kernels.launch.self_checks import self_checks
from tests.kernels.launch.stand_in import activate, launched


def record_entries() -> list[str]:
    """Return a list that grows by the name of a launch entry whenever a launch takes its settings.

    A list of kernels would not do: two entries may belong to one kernel.
    """
    names = {
        id(launch): f"{kernel} {bits} {arch}"
        for kernel, table in LAUNCHES.items()
        for (bits, arch), launch in table.items()
    }
    taken, kwargs = [], Launch.kwargs

    def recorded(launch: Launch) -> dict:
        taken.append(names.get(id(launch), "planted"))
        return kwargs(launch)

    Launch.kwargs = recorded
    return taken


FAMILIES = {
    "usual": usual,
    "planted": planted,
    "thorough": anchored_thoroughly,
    "self-check": self_checks,
}


def main(part: str, *families: str) -> None:
    activate(part)
    taken = record_entries()
    for family in families:
        for name, run in FAMILIES[family](part):
            taken.clear()
            before, error = len(launched()), ""
            try:
                run()
            except Exception as raised:  # the report says what it was
                error = f"{type(raised).__name__}: {raised}"
            report = {
                "family": family,
                "case": name,
                "error": error,
                "entries": taken,
                "kernels": launched()[before:],
            }
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
