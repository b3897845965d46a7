"""Predict the time of every case from operations, bytes and instructions, and hold it to records.

    python -m benchmarks.roofline --device h200 --rows 16384

A call is a sequence of matrix products, of passes over bytes and of epilogues; each costs what its
slowest resource needs, and only what is known to run side by side overlaps. Nothing is fitted to
a measurement of this package. Where a record has the case, its figure stands beside the prediction;
everywhere else the figure is predicted, and says so.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.environment import RESULTS
from benchmarks.shapes import CPU_SHAPES, CUDA_SHAPES
from fastgrpo.head.plan import GPU_WORKSPACE_MB, chunk_rows

BOUND = "GEMM bound"
MIB = 1 << 20
WORKSPACE = GPU_WORKSPACE_MB * MIB
CHUNK_ROWS = 8192  # of it, at most
SLICE = 8192  # columns of the vocabulary that one backward product takes


class Machine(NamedTuple):
    """What a device does at its best, as measured by others."""

    name: str
    rate: float  # FLOP/s of 16-bit library GEMMs with a long contraction, random data
    bandwidth: float  # bytes/s of device memory, copying
    multiprocessors: int
    l2: int  # bytes
    clock: float  # 1/s, under load
    source: str


MACHINES = {
    "h200": Machine(
        "H200 SXM", 790e12, 4.3e12, 132, 50 * MIB, 1.69e9,
        "a library GEMM on random data and a copy, unpublished; clock from 0.28 ps an exponential",
    ),
    "h100": Machine(
        "H100 SXM", 735e12, 3.0e12, 132, 50 * MIB, 1.69e9,
        "TRL #7244: 42 ms for the three products of 8192 x 151936 x 4096; 90 % of 3.35 TB/s",
    ),
}  # fmt: skip


def cpu_machine(rate: float, source: str) -> Machine:
    """Return a CPU: its GEMM rate is the only constant, passes and epilogues are free."""
    return Machine("CPU", rate, math.inf, 1, 0, math.inf, source)


class Case(NamedTuple):
    """Work on one head. Shares are of the rows."""

    rows: int
    vocab: int
    hidden: int
    mode: str = "loss"  # logps, loss, frozen, token_logps
    scored: float = 1.0  # rows that need a forward
    live: float = 1.0  # rows that have a gradient
    kept: float = 46.0  # entries a live row keeps: the sparse backward alone

    @property
    def gemms(self) -> int:
        """Products of rows x vocab x hidden that a dense call cannot avoid."""
        return {"logps": 1, "frozen": 2}.get(self.mode, 3)

    @property
    def product(self) -> float:
        """FLOP of one of them."""
        return 2.0 * self.rows * self.vocab * self.hidden


# Share of its rate that a library GEMM reaches by length of the contraction: triton's Gluon
# tutorial 07, cuBLAS column, H100, 540 588 616 646 661 TFLOP/s.
_EFFICIENCY = ((512, 0.817), (1024, 0.890), (2048, 0.932), (4096, 0.977), (8192, 1.0))
# Instructions per logit of the compiled forward on sm_90, main loop included: a thread holds
# 128 logits of a tile. A test holds them to tests/kernels/compile/compile-budget.json.
STATISTICS = 1600 / 128  # kernel "anchored"
EXPONENTIALS = 1728 / 128  # kernel "anchored-exps-plain"
DRAW = 2248 / 128  # kernel "anchored-draw-plain"
HIDDEN_SHARE = 0.5  # of an epilogue, under the products of the next tile


def efficiency(contraction: int) -> float:
    """Return the share of its rate that a GEMM of this contraction length reaches."""
    points = _EFFICIENCY
    if contraction <= points[0][0]:
        return points[0][1] * contraction / points[0][0]
    for (low, a), (high, b) in zip(points, points[1:], strict=False):
        if contraction <= high:
            return a + (b - a) * math.log(contraction / low) / math.log(high / low)
    return 1.0


def waves(rows: int, columns: int, machine: Machine) -> float:
    """Return the factor by which the last, partly filled wave of 128 x 256 tiles slows a GEMM.

    A library splits the contraction in up to four where that fills the multiprocessors better.
    """
    tiles, sms = math.ceil(rows / 128) * math.ceil(columns / 256), machine.multiprocessors
    if sms == 1:
        return 1.0
    return min(math.ceil(tiles * s / sms) * sms / (tiles * s) for s in (1, 2, 3, 4))


def gemm(
    machine: Machine, rows: int, columns: int, contraction: int, *, piece: int | None = None
) -> float:
    """Return the seconds of one library GEMM, or of several that share its contraction.

    `piece` is the contraction length of each of these.
    """
    flop = 2.0 * rows * columns * contraction
    if machine.multiprocessors == 1:
        return flop / machine.rate
    length = contraction if piece is None else min(piece, contraction)
    return flop / (machine.rate * efficiency(length)) * waves(rows, columns, machine)


def epilogue(machine: Machine, logits: float, instructions: float) -> float:
    """Return the seconds of a fused kernel's work on its logits that nothing hides."""
    per_clock = machine.multiprocessors * machine.clock
    per_logit = instructions / (128 * per_clock) + 1 / (16 * per_clock)  # 128 lanes, 16 exponents
    return (1 - HIDDEN_SHARE) * logits * per_logit


def bound(machine: Machine, case: Case) -> float:
    """Return the seconds of the products that a dense call cannot avoid, at the full rate.

    Rows that drop out are not in it: of a loss (2b + 4a) / 6 remain, with a share b of the rows
    scored and a share a live.
    """
    share = case.scored + (case.gemms - 1) * case.live
    return share * case.product / machine.rate


def forward(
    machine: Machine, case: Case, *, instructions: float = STATISTICS, written: float = 0.0
) -> float:
    """Return the seconds of the fused forward kernel; `written` bytes a logit, beside products."""
    rows = round(case.scored * case.rows)
    if not rows:
        return 0.0
    logits = rows * case.vocab
    computed = gemm(machine, rows, case.vocab, case.hidden)
    computed += epilogue(machine, logits, instructions)
    return max(computed, (written * logits + 2 * case.vocab * case.hidden) / machine.bandwidth)


def _backward_products(
    machine: Machine, case: Case, rows: int, chunk: int, *, piece: int | None = None
) -> float:
    """Return the seconds of dhidden and, unless the head is frozen, dweight over chunks of rows.

    Several chunks add to an fp32 dweight: read and written once more for each but the first. So
    does dhidden for each `piece` of the vocabulary but the first, unless it stays in the L2.
    """
    seconds, chunk = 0.0, max(1, min(chunk, rows))
    for start in range(0, rows, chunk):
        size = min(chunk, rows - start)
        seconds += gemm(machine, size, case.hidden, case.vocab, piece=piece)
        if piece and 4 * size * case.hidden > machine.l2 / 2:
            more = math.ceil(case.vocab / piece) - 1
            seconds += more * 8 * size * case.hidden / machine.bandwidth
        if case.gemms == 3:
            seconds += gemm(machine, case.vocab, case.hidden, size)
            if start:
                seconds += 8 * case.vocab * case.hidden / machine.bandwidth
    return seconds


def tile_route(machine: Machine, case: Case) -> float:
    """fastgrpo on other GPUs: an fp32 tile from the library, two passes over it, two products.

    A logit is read by the statistics (4 bytes), read and written by its gradient (4 and 2). Rows
    without a gradient go through the forward kernel.
    """
    if case.mode == "logps":
        return forward(machine, case)
    live = round(case.live * case.rows)
    rest = forward(machine, case._replace(scored=max(0.0, case.scored - case.live)))
    if not live:
        return rest
    logits = live * case.vocab
    written = 4 * logits / machine.bandwidth
    products = max(gemm(machine, live, case.vocab, case.hidden), written)
    if case.mode == "token_logps":  # the tile is gone when the gradient comes: made twice
        products += forward(machine, case._replace(scored=case.live))
    chunk = min(CHUNK_ROWS, WORKSPACE // (6 * case.vocab))
    products += _backward_products(machine, case, live, chunk, piece=SLICE)
    return rest + products + 10 * logits / machine.bandwidth


def anchored_route(machine: Machine, case: Case) -> float:
    """fastgrpo on Hopper: one kernel leaves 16-bit exponentials, and two products take them."""
    if case.mode == "logps":
        return forward(machine, case)
    live = round(case.live * case.rows)
    rest = forward(machine, case._replace(scored=max(0.0, case.scored - case.live)))
    if not live:
        return rest
    made = forward(machine, case._replace(scored=case.live), instructions=EXPONENTIALS, written=2.0)
    if case.mode == "token_logps":
        made += forward(machine, case._replace(scored=case.live))
    most = WORKSPACE // (2 * case.vocab)
    chunk = chunk_rows(live, most, case.hidden, machine.multiprocessors, case.gemms == 3)
    return rest + made + _backward_products(machine, case, live, chunk)


def sparse_route(machine: Machine, case: Case, *, anchored: bool = True) -> float:
    """The sparse backward: a forward that draws, then sums over the kept entries.

    anchored: drawn in the forward kernel, left as a bit mask, V/8 bytes a row. Else on the fp32
    tile of the library, which statistics and draw read once each. A kept entry fetches its row of
    the weight for its logit and again for dhidden, and its row of hidden for dweight, all from
    memory; the entries are sorted (eight passes of 16 bytes) and a dense dweight is written.
    """
    if case.mode == "logps":
        return forward(machine, case)
    live = round(case.live * case.rows)
    rest = forward(machine, case._replace(scored=max(0.0, case.scored - case.live)))
    logits, entries = live * case.vocab, live * case.kept
    if anchored:
        drawn = forward(machine, case._replace(scored=case.live), instructions=DRAW, written=1 / 8)
        drawn += logits / 8 / machine.bandwidth
    else:
        written = 4 * logits / machine.bandwidth
        drawn = max(gemm(machine, live, case.vocab, case.hidden), written) if live else 0.0
        drawn += 8 * logits / machine.bandwidth
    fetched = 2 * case.hidden * entries * (2 + (case.gemms == 3))
    sorted_bytes = 8 * 2 * 16 * entries if case.gemms == 3 else 0
    dense = 2 * case.vocab * case.hidden if case.gemms == 3 else 0
    return rest + drawn + (fetched + sorted_bytes + dense) / machine.bandwidth


def plain_logits(machine: Machine, case: Case) -> float:
    """All logits, an fp32 log-softmax, autograd: 46 bytes a logit, fitted to TRL #7244's 59 ms."""
    n = case.rows
    bytes_moved = (12 if case.mode == "logps" else 46) * n * case.vocab
    seconds = gemm(machine, n, case.vocab, case.hidden) + bytes_moved / machine.bandwidth
    if case.mode == "logps":
        return seconds
    return seconds + _backward_products(machine, case, n, n)


def trl_chunked(machine: Machine, case: Case) -> float:
    """TRL 1.16: 8NVH in tiles of 4096 x 32768, both gradients added up in fp32; 8 bytes a logit.

    Masked rows drop out of it, rows without advantage do not.
    """
    n = round(case.scored * case.rows)
    again = gemm(machine, n, case.vocab, case.hidden)
    if case.mode == "logps":
        return again + 4 * n * case.vocab / machine.bandwidth
    seconds = 2 * again + gemm(machine, n, case.hidden, case.vocab, piece=32768)
    moved = 8 * n * case.vocab + math.ceil(case.vocab / 32768) * 8 * n * case.hidden
    if case.gemms == 3:
        seconds += gemm(machine, case.vocab, case.hidden, n, piece=4096)
        moved += math.ceil(n / 4096) * 8 * case.vocab * case.hidden
    return seconds + moved / machine.bandwidth


def liger_grpo(machine: Machine, case: Case) -> float:
    """Liger's GRPO loss: 8NVH, its two gradient products in fp32 without TF32 (55 TFLOP/s)."""
    again = gemm(machine, case.rows, case.vocab, case.hidden)
    if case.mode == "logps":
        return again + 25 * case.rows * case.vocab / machine.bandwidth
    fp32 = machine.rate if machine.multiprocessors == 1 else 55e12
    moved = 50 * case.rows * case.vocab / machine.bandwidth
    return 2 * again + (case.gemms - 1) * case.product / fp32 + moved


def liger_scaled(machine: Machine, case: Case) -> float:
    """Liger's scaled cross-entropy: 8NVH in fused kernels, waves of 1024 rows in the backward."""
    scored = forward(machine, case._replace(scored=1.0))
    if case.mode == "logps":
        return scored
    return 2 * scored + _waves_of_1024(machine, case)


def _waves_of_1024(machine: Machine, case: Case) -> float:
    # What a wave adds to dweight is added by the memory system, under the products.
    dhidden = gemm(machine, case.rows, case.hidden, case.vocab)
    dweight = gemm(machine, case.vocab, case.hidden, case.rows, piece=1024)
    return dhidden + (dweight if case.gemms == 3 else 0.0)


def quack(machine: Machine, case: Case) -> float:
    """QuACK's linear cross-entropy, 6NVH, a scalar loss: one pass over 16-bit logits, 4 bytes."""
    n = case.rows
    seconds = gemm(machine, n, case.vocab, case.hidden) + 4 * n * case.vocab / machine.bandwidth
    return seconds + _backward_products(machine, case, n, 4096)


def cce_exact(machine: Machine, case: Case) -> float:
    """Apple's CCE without its filter: everything made twice in its own kernels, 0.6 of the rate."""
    products = 1 if case.mode == "logps" else 1 + case.gemms
    return products * case.product / (0.6 * machine.rate)


Route = Callable[[Machine, Case], float]
ROUTES: dict[str, Route] = {
    BOUND: bound,
    "fastgrpo triton": anchored_route,
    "fastgrpo triton, tiles": tile_route,
    "fastgrpo sparse": sparse_route,
    "fastgrpo sparse, tiles": lambda machine, case: sparse_route(machine, case, anchored=False),
    "plain logits": plain_logits,
    "TRL chunked": trl_chunked,
    "Liger GRPO": liger_grpo,
    "Liger scaled CE": liger_scaled,
    "QuACK": quack,
    "Apple CCE exact": cce_exact,
}
# On a CPU everything but products is free, and only their number differs.
CPU_ROUTES: dict[str, Route] = {
    BOUND: bound,
    "fastgrpo torch": anchored_route,
    "fastgrpo sparse": sparse_route,
    "plain logits": plain_logits,
    "TRL chunked": trl_chunked,
    "Liger GRPO": liger_grpo,
    "F.linear_cross_entropy": trl_chunked,
}
SPARSE = ("fastgrpo sparse", "fastgrpo sparse, tiles")

# Shares of the rows that are scored and that have a gradient, by the records' mode. Rows without
# an advantage are scored, for their log-probs are returned, unless that is declined
# ("half_skipped", which is measured for our own loss alone); masked ones are not.
SHARES = {
    "half_zero": (1.0, 0.5),
    "half_masked": (0.5, 0.5),
    "half_skipped": (0.5, 0.5),
    "skip_90": (1.0, 0.1),
    "rl": (0.75, 0.375),
}


def case_of(shape: dict[str, Any], mode: str, kept: float = 46.0) -> Case:
    """Return the case of a record's shape and mode."""
    scored, live = SHARES.get(mode, (1.0, 1.0))
    kind = mode if mode in ("logps", "frozen", "token_logps") else "loss"
    return Case(shape["rows"], shape["vocab"], shape["hidden"], kind, scored, live, kept)


def predictions(machine: Machine, case: Case) -> dict[str, float]:
    """Return milliseconds by provider."""
    routes = CPU_ROUTES if machine.multiprocessors == 1 else ROUTES
    if case.mode != "loss":
        routes = {name: route for name, route in routes.items() if name != "QuACK"}
    return {name: route(machine, case) * 1e3 for name, route in routes.items()}


def compare(machine: Machine, row: dict[str, Any]) -> float | None:
    """Return the predicted milliseconds of a speed row of a record, if its provider is modelled."""
    case = case_of(row["shape"], row["mode"], row.get("kept", 46.0))
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

    A sparse call's share is of the products of a forward, which are all that it cannot avoid.
    `names` chooses among the providers, none: all.
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


def kept_table(machine: Machine, rows: int, kept: tuple[int, ...] = (10, 34, 100, 272)) -> str:
    """Return predicted milliseconds of the sparse backward by kept entries and live rows.

    In brackets the time in forward products, 2NVH: what a dense loss needs three of.
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
