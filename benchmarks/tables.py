"""Write the README's tables from the newest record: `python -m benchmarks.tables`.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`, and names the record that it
comes from. Nothing in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases import BOUND
from benchmarks.environment import ROOT
from benchmarks.record import RESULTS

README = ROOT / "README.md"
Row = dict[str, Any]


def newest(kind: str, results: Path = RESULTS) -> Path | None:
    """Return the record with the latest date among those of a "cpu" or a "cuda" device."""
    dated = []
    for path in results.glob("*.json"):
        record = json.loads(path.read_text())
        if (record["gpu"] is not None) == (kind == "cuda"):
            dated.append((record["date"], path))
    return max(dated)[1] if dated else None


def speed_table(record: Row, *, mode: str = "loss") -> str:
    """Return time, share of the bound and peak memory: a row a provider, a block a case."""
    lines = ["| tokens x vocabulary x hidden | implementation | ms (p10-p90) | share | peak MiB |"]
    lines += ["|---|---|---|---|---|"]
    peaks = {_key(row): row for row in record["memory"] if "peak_mib" in row}
    timed = {_key(row) for row in record["speed"]}
    untimed = [row for key, row in peaks.items() if key not in timed]
    for row in record["speed"] + untimed:
        if row["mode"] != mode or row["provider"] == BOUND:
            continue
        peak = row.get("peak_mib", peaks.get(_key(row), {}).get("peak_mib"))
        shown = "-" if peak is None else f"{peak:,.0f}"
        if "median_ms" not in row:
            cells = f"{'failed' if 'failure' in row else 'not timed'} | - | {shown}"
        else:
            times = f"{row['median_ms']:,.0f} ({row['p10_ms']:,.0f}-{row['p90_ms']:,.0f})"
            cells = f"{times} | {row['share_of_bound']:.2f} | {shown}"
        lines.append(f"| {_size(row)} | {row['provider']} | {cells} |")
    return "\n".join(lines)


def accuracy_table(record: Row, *, mode: str = "loss") -> str:
    """Return the distances from the fp64 oracle: a row a provider, a block a case."""
    lines = ["| tokens x vocabulary x hidden | implementation | log-prob rms | dhidden | dweight |"]
    lines += ["|---|---|---|---|---|"]
    for row in record["accuracy"]:
        if row["mode"] != mode or "errors" not in row:
            continue
        found = row["errors"]
        cells = " | ".join(_scientific(found[k]) for k in ("logps_rms", "dhidden", "dweight"))
        lines.append(f"| {_size(row)} | {row['provider']} | {cells} |")
    return "\n".join(lines)


# The marker's name: the kind of device whose newest record it shows, and how.
TABLES: dict[str, tuple[str, Callable[[Row], str]]] = {
    "cpu": ("cpu", speed_table),
    "cuda": ("cuda", speed_table),
    "accuracy": ("cpu", accuracy_table),
    "accuracy-cuda": ("cuda", accuracy_table),
}


def fill(text: str, results: Path = RESULTS) -> str:
    """Return `text` with every marked table written anew.

    Raises ValueError for an unknown table name; a device without a record gets a sentence.
    """

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"table must be one of {sorted(TABLES)}, got {name!r}")
        kind, render = TABLES[name]
        path = newest(kind, results)
        body = "No record yet." if path is None else _caption(path) + "\n\n" + _render(path, render)
        return f"<!-- table:{name} -->\n{body}\n<!-- /table -->"

    return re.sub(r"<!-- table:([\w-]+) -->.*?<!-- /table -->", table, text, flags=re.DOTALL)


def _render(path: Path, render: Callable[[Row], str]) -> str:
    return render(json.loads(path.read_text()))


def _caption(path: Path) -> str:
    record = json.loads(path.read_text())
    versions = record["versions"]
    names = [name for name in ("torch", "triton", "trl", "liger-kernel") if name in versions]
    installed = ", ".join(f"{name} {versions[name]}" for name in names)
    link = f"[{path.name}](benchmarks/results/{path.name})"
    return f"{record['device']}, {record['threads']} threads, {installed}; record {link}."


def _key(row: Row) -> tuple:
    return row["provider"], tuple(row["shape"].values()), row["dtype"], row["mode"]


def _size(row: Row) -> str:
    shape = row["shape"]
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]]
    return f"{shape['rows']} x {shape['vocab']} x {shape['hidden']} {dtype}"


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}" if value == 0 else f"{value:.1e}"


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, default=README)
    path = parser.parse_args(arguments).readme
    path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
