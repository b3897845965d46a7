"""The tables of what a support costs, from a record of `benchmarks.support_cost`."""

from __future__ import annotations

from typing import Any

from benchmarks.support_cost import DENSE, MASKED, WAYS

Row = dict[str, Any]


def times_table(record: Row) -> str:
    """Return time, share of the dense loss and peak memory, one row for each profile and head."""
    lines = ["| tokens x vocabulary x hidden | ids a token: mean / median / share with one "]
    lines[0] += "| ms (p10-p90) | of the dense loss | peak MiB |"
    lines += ["|---|---|---|---|---|"]
    peaks = {
        (_size(row), DENSE if row["mode"] == "loss" else row["mode"]): f"{row['peak_mib']:,.0f}"
        for row in record["memory"]
        if "peak_mib" in row
    }
    names = {DENSE: "the whole vocabulary", MASKED: "all logits, masked"}
    for row in record["times"]:
        ids = names.get(row["name"]) or (
            f"{row['ids_mean']:.0f} / {row['ids_median']} / {row['alone']:.0%}"
        )
        ms = f"{row['p50_ms']:,.0f} ({row['p10_ms']:,.0f}-{row['p90_ms']:,.0f})"
        peak = peaks.get((_size(row), row["name"]), "-")
        lines.append(f"| {_size(row)} | {ids} | {ms} | {row['of_dense']:.2f} | {peak} |")
    return "\n".join(lines)


def curve_table(record: Row) -> str:
    """Return both ways of a row over the number of its ids, as shares of the dense loss."""
    lines = ["| tokens x vocabulary x hidden | ids a token | gathered rows | tiles of logits |"]
    lines += ["|---|---|---|---|"]
    shares = {(_size(r), r["ids"], r["name"]): r["of_dense"] for r in record["curve"]}
    for size, ids in dict.fromkeys((_size(row), row["ids"]) for row in record["curve"]):
        vocab = int(size.split(" x ")[1])
        cells = " | ".join(f"{shares[size, ids, way]:.2f}" for way in WAYS)
        lines.append(f"| {size} | {ids} (V / {vocab / ids:.0f}) | {cells} |")
    return "\n".join(lines)


def _size(row: Row) -> str:
    return " x ".join(str(row["shape"][name]) for name in ("rows", "vocab", "hidden"))
