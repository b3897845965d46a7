"""Hold a GPU's record against the goals that the package sets itself, for an H200."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

BOUND = "GEMM bound"
DENSE, SPARSE = "fastgrpo triton", "fastgrpo sparse"
LARGE = (8192, 151936, 4096)
Row = dict[str, Any]


class Target(NamedTuple):
    """A goal; `values` yields one figure for each case of a record that it is about."""

    name: str
    limit: float
    values: Callable[[Row], Iterator[float]]
    at_least: bool  # or at most

    def state(self, record: Row) -> tuple[str, str]:
        """Return the worst figure and whether it is enough: met, missed or not measured."""
        found = list(self.values(record))
        if not found:
            return "-", "not measured"
        worst = min(found) if self.at_least else max(found)
        good = worst >= self.limit if self.at_least else worst <= self.limit
        return f"{worst:.3g}", "met" if good else "missed"


def _rows(record: Row, provider: str, mode: str) -> Iterator[Row]:
    for row in record["speed"]:
        if row["provider"] == provider and row["mode"] == mode and "median_ms" in row:
            yield row


def _size(row: Row) -> tuple[int, int, int]:
    return row["shape"]["rows"], row["shape"]["vocab"], row["shape"]["hidden"]


def _shares(mode: str, narrow: bool | None = None) -> Callable[[Row], Iterator[float]]:
    """Shares of the bound of H <= 1024 (narrow), H >= 2560 (not narrow), or all (None)."""

    def values(record: Row) -> Iterator[float]:
        for row in _rows(record, DENSE, mode):
            hidden = row["shape"]["hidden"]
            if narrow is None or (hidden <= 1024 if narrow else hidden >= 2560):
                yield row["share_of_bound"]

    return values


def _ratios(
    top: tuple[str, str], bottom: tuple[str, str], factor: float = 1.0
) -> Callable[[Row], Iterator[float]]:
    """Time of (provider, mode) over that of another at the same size, where both were measured."""

    def values(record: Row) -> Iterator[float]:
        other = {_size(row): row["median_ms"] for row in _rows(record, *bottom)}
        for row in _rows(record, *top):
            if _size(row) in other:
                yield factor * row["median_ms"] / other[_size(row)]

    return values


def _large(field: str, scale: float = 1.0) -> Callable[[Row], Iterator[float]]:
    def values(record: Row) -> Iterator[float]:
        for row in _rows(record, DENSE, "loss"):
            if _size(row) == LARGE and field in row:
                yield scale * row[field]

    return values


TARGETS = (
    Target("log-probs, share of 2NVH, H >= 2560", 0.90, _shares("logps", False), True),
    Target("log-probs, share of 2NVH, H = 1024", 0.80, _shares("logps", True), True),
    Target("fused loss, share of 6NVH, H >= 2560", 0.92, _shares("loss", False), True),
    Target("fused loss, share of 6NVH, H = 1024", 0.92, _shares("loss", True), True),
    Target("frozen head, share of 4NVH", 0.90, _shares("frozen"), True),
    Target(
        "half of the rows masked, of the dense time",
        0.55, _ratios((DENSE, "half_masked"), (DENSE, "loss")), False,
    ),
    Target(
        "half of the rows without advantage and not scored, of the dense time",
        0.55, _ratios((DENSE, "half_skipped"), (DENSE, "loss")), False,
    ),
    # The bound of the loss is three products, and a forward is one of them.
    Target(
        "sparse at tau = 1e-3, a policy's rows, of 2NVH",
        1.25, _ratios((SPARSE, "policy"), (BOUND, "policy"), 3.0), False,
    ),
    Target("8192 x 151936 x 4096, ms", 43.0, _large("median_ms"), False),
    Target("8192 x 151936 x 4096, GB", 5.5, _large("peak_mib", 2**20 / 1e9), False),
    Target("times TRL 1.16", 1.4, _ratios(("TRL chunked", "loss"), (DENSE, "loss")), True),
    Target("times Liger GRPO", 5.0, _ratios(("Liger GRPO", "loss"), (DENSE, "loss")), True),
)  # fmt: skip


def table(record: Row) -> str:
    """Return the goals with the worst case of a GPU's record."""
    lines = ["| goal on an H200 | limit | worst case | state |", "|---|---|---|---|"]
    for target in TARGETS:
        worst, state = target.state(record)
        sign = ">=" if target.at_least else "<="
        lines.append(f"| {target.name} | {sign} {target.limit:g} | {worst} | {state} |")
    return "\n".join(lines)
