"""Predict our own times from operations, bytes and instructions, and hold them to records.

    python -m benchmarks.time_model.roofline --device h200 --rows 16384

A call is a sequence of matrix products, of passes over bytes and of epilogues. Each of them costs
what its slowest resource needs. Only what is known to run side by side overlaps. Nothing is fitted
to a measurement of this package. Where a record has the case, its figure stands beside the
prediction. Every other figure says that it is predicted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from benchmarks.environment import RESULTS
from benchmarks.shapes import CPU_SHAPES, CUDA_SHAPES
from benchmarks.time_model.machines import MACHINES, Machine, cpu_machine
from benchmarks.time_model.routes import (
    BOUND,
    CPU_ROUTES,
    KEPT,
    ROUTES,
    SPARSE,
    Case,
    anchored_route,
    bound,
    case_of,
    entry_bytes,
    sparse_route,
    support_route,
)


def predictions(machine: Machine, case: Case) -> dict[str, float]:
    """Return milliseconds by provider."""
    routes = CPU_ROUTES if machine.multiprocessors == 1 else ROUTES
    return {name: route(machine, case) * 1e3 for name, route in routes.items()}


def compare(machine: Machine, row: dict[str, Any]) -> float | None:
    """Return the predicted milliseconds of a speed row of a record, if its provider is modelled."""
    case = case_of(row["shape"], row["mode"], row.get("kept", KEPT))
    if row["provider"] == BOUND:  # the measured bound never skips
        case = case._replace(scored=1.0, live=1.0)
    return predictions(machine, case).get(row["provider"])


def machine_of(record: dict[str, Any]) -> Machine:
    """Return the machine a record is from; a CPU's rate is that of the record's own bound."""
    if record["gpu"] is None:
        rates = [r["tflops"] for r in record["speed"] if r["provider"] == BOUND]
        return cpu_machine(sorted(rates)[len(rates) // 2] * 1e12, "the record's own products")
    name = "h100" if "H100" in record["device"] else "h200"
    return MACHINES[name]


def newest_speed(name: str) -> dict[str, Any] | None:
    """Return the newest record with speeds of a machine of MACHINES, or of a "cpu"."""
    found = []
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        if "speed" not in record:
            continue
        kind = "cpu" if record["gpu"] is None else machine_of(record).name[:4].lower()
        if kind == name:
            found.append(record)
    return max(found, key=lambda record: record["date"], default=None)


def measured_table(machine: Machine, record: dict[str, Any]) -> str:
    """Return prediction beside measurement, for every row of a record that is modelled."""
    titles = "| tokens x vocabulary x hidden | mode | implementation "
    lines = [f"{titles}| predicted | measured | ratio |", "|---|---|---|---|---|---|"]
    for row in record["speed"]:
        expected = compare(machine, row) if "median_ms" in row else None
        if expected is None or (row["provider"] == BOUND and machine.multiprocessors == 1):
            continue  # a CPU's constants are its bound
        shape = row["shape"]
        size = f"{shape['rows']} x {shape['vocab']} x {shape['hidden']} {row['dtype']}"
        lines.append(
            f"| {size} | {row['mode']} | {row['provider']} | {expected:,.1f} ms "
            f"| {row['median_ms']:,.1f} ms | {row['median_ms'] / expected:.2f} |"
        )
    return "\n".join(lines)


def predicted_table(
    machine: Machine, rows: int, modes: tuple[str, ...], names: tuple[str, ...] = ()
) -> str:
    """Return predicted milliseconds, and in brackets the share of the bound of the exact call.

    The share of a sparse call is of the forward's product, the only one that it cannot avoid.
    `names` chooses among the providers; without names the table has all of them.
    """
    heads = [shape for shape in CUDA_SHAPES if shape.rows == rows]
    if machine.multiprocessors == 1:
        heads = list(CPU_SHAPES)
    titles = " | ".join(f"{s.name} {s.vocab} x {s.hidden}" for s in heads)
    lines = [f"| mode | implementation | {titles} |", "|---|---|" + "---|" * len(heads)]
    for mode in modes:
        cases = [case_of(shape._asdict(), mode) for shape in heads]
        columns = [predictions(machine, case) for case in cases]
        for name in names or tuple(columns[0]):
            if name not in columns[0] or (mode == "logps" and name in SPARSE):
                continue
            cells = []
            for case, column in zip(cases, columns, strict=True):
                floor = bound(machine, case._replace(live=0.0) if name in SPARSE else case)
                cells.append(f"{column[name]:,.1f} ({floor * 1e3 / column[name]:.2f})")
            lines.append(f"| {mode} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kept_table(machine: Machine, rows: int, kept: Sequence[int]) -> str:
    """Return predicted milliseconds of the sparse backward by kept entries and live rows.

    In brackets stands the time in forward products, 2NVH. A dense loss needs three of them.
    """
    heads = [shape for shape in CUDA_SHAPES if shape.rows == rows]
    titles = " | ".join(f"{s.name} {s.vocab} x {s.hidden}" for s in heads)
    lines = [f"| kept a row | live rows | {titles} |", "|---|---|" + "---|" * len(heads)]
    for entries in kept:
        for live in (1.0, 0.5):
            cells = []
            for shape in heads:
                case = Case(rows, shape.vocab, shape.hidden, live=live, kept=entries)
                seconds = sparse_route(machine, case)
                product = bound(machine, case._replace(live=0.0))
                cells.append(f"{seconds * 1e3:.1f} ({seconds / product:.2f})")
            lines.append(f"| {entries} | {live:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def support_table(machine: Machine, rows: int, kept: Sequence[int]) -> str:
    """Return predicted bytes and milliseconds of a loss over a support, by the ids of a row.

    In brackets stands the share of the dense loss's predicted time.
    """
    heads = [shape for shape in CUDA_SHAPES if shape.rows == rows]
    titles = " | ".join(f"{s.name} {s.vocab} x {s.hidden}" for s in heads)
    lines = [f"| ids a token | {titles} |", "|---|" + "---|" * len(heads)]
    for ids in kept:
        cells = []
        for shape in heads:
            case = Case(rows, shape.vocab, shape.hidden, kept=ids)
            seconds, dense = support_route(machine, case), anchored_route(machine, case)
            moved = entry_bytes(case, rows * ids) / 1e9
            cells.append(f"{moved:.1f} GB, {seconds * 1e3:.1f} ms ({seconds / dense:.2f})")
        lines.append(f"| {ids} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=[*MACHINES, "cpu"], default="h200")
    parser.add_argument("--rows", type=int, choices=(4096, 16384, 65536), default=16384)
    parser.add_argument("--mode", nargs="+", default=["logps", "loss", "frozen", "half_zero"])
    options = parser.parse_args(arguments)
    record = newest_speed(options.device)
    machine = MACHINES.get(options.device) or (machine_of(record) if record else None)
    if machine is None:
        parser.error("a CPU's GEMM rate comes from its record: run python -m benchmarks.record")
    print(f"{machine.name}: {machine.source}\n")
    print("Predicted ms (share of the bound).\n")
    print(predicted_table(machine, options.rows, tuple(options.mode)))
    if record:
        print(f"\nBeside the record of {record['date']}, {record['device']}.\n")
        print(measured_table(machine, record))
    else:
        print("\nNo record of this device: every figure is predicted.")


if __name__ == "__main__":
    main()
