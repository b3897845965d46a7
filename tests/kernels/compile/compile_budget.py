"""Write the resources of every compiled kernel: `python -m tests.kernels.compile.compile_budget`.

The table, compile-budget.json beside this file, has one line for each kernel and architecture, so
that a diff shows what a change costs. It is valid for the version of Triton that it was made with.
`complaints` has the limits that hold with any version.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import triton

from benchmarks.environment import write_record
from fastgrpo_kernels.runtime import launch_for
from tests.kernels.compile.compiling import CASES, PARTS, VARIANTS, Usage, compiled, usage

TABLE = Path(__file__).with_name("compile-budget.json")
COMMAND = "python -m tests.kernels.compile.compile_budget"
# Every case on every part that has a launch entry for it, the variants on one.
PAIRS = [
    *((name, part) for name, case in CASES.items() for part in case.parts),
    *((name, "sm_90") for name in VARIANTS),
]


def complaints(name: str, part: str, used: Usage) -> list[str]:
    """Return what a kernel does that none may do, whatever the Triton."""
    case, limits = (CASES | VARIANTS)[name], PARTS[part]
    launch = launch_for(case.launch, case.bits, limits.arch)
    broken = {
        f"{used.shared} bytes of shared memory of {limits.shared_limit}": (
            used.shared > limits.shared_limit
        ),
        f"{used.stack} bytes of registers spilled": part == "sm_90" and used.stack > 0,
        f"no {limits.matrix_instruction} in a 16-bit product": (
            case.bits == 16 and limits.matrix_instruction not in used.matrix
        ),
        "descriptors that TMA does not load": (
            "tensordesc" in str(case.arguments) and "load" not in used.tma
        ),
        "warps not specialised": launch.blocks.get("WARP_SPECIALIZE") and not used.specialised,
        f"{used.fp64} times fp64": used.fp64 > 0,
        f"{used.atomics} atomics: the order would vary": used.atomics > 0,
    }
    return [complaint for complaint, holds in broken.items() if holds]


def measure() -> dict[str, Any]:
    """Return the table's content, made anew. What a kernel has none of is left out."""
    kernels = {}
    for name, part in PAIRS:
        used = usage(compiled(name, part))._asdict()
        kernels[f"{name} {part}"] = {what: value for what, value in used.items() if value}
    return {"triton": triton.__version__, "kernels": dict(sorted(kernels.items()))}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return one line for each kernel and part that two tables do not agree on."""
    lines = []
    for key in sorted(old["kernels"].keys() | new["kernels"].keys()):
        before, after = (table["kernels"].get(key) for table in (old, new))
        if before is None or after is None:
            lines.append(f"{key}: {'new' if before is None else 'gone'}")
        elif before != after:
            values = {x: (before.get(x, 0), after.get(x, 0)) for x in Usage._fields}
            changes = (f"{x} {a} -> {b}" for x, (a, b) in values.items() if a != b)
            lines.append(f"{key}: {', '.join(changes)}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=TABLE)
    path = parser.parse_args(arguments).output
    new = measure()
    if path.exists():
        print(*differences(json.loads(path.read_text()), new), sep="\n")
    write_record(path, new)
    print(f"wrote {path.name}: {len(new['kernels'])} kernels, triton {new['triton']}")


if __name__ == "__main__":
    main()
