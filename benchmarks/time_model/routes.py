"""Predict what one call of ours takes, by the route that it goes through products and kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.time_model.machines import MIB, Machine, epilogue, gemm
from fastgrpo.head.plan import GPU_WORKSPACE_MB, chunk_rows

BOUND = "GEMM bound"
WORKSPACE = GPU_WORKSPACE_MB * MIB
CHUNK_ROWS = 8192  # of it, at most
SLICE = 8192  # columns of the vocabulary that one backward product takes
# Instructions per logit of the compiled forward on sm_90, main loop included: a thread holds
# 128 logits of a tile. A test holds them to tests/kernels/compile/compile-budget.json.
STATISTICS = 1600 / 128  # kernel "anchored"
EXPONENTIALS = 1728 / 128  # kernel "anchored-exps-plain"
DRAW = 2248 / 128  # kernel "anchored-draw-plain"
# Entries that a real policy's row keeps at tau = 1e-3, on average. A test holds it to the profile.
KEPT = 87.0


class Case(NamedTuple):
    """Work on one head. Shares are of the rows."""

    rows: int
    vocab: int
    hidden: int
    mode: str = "loss"  # logps, loss, frozen, token_logps
    scored: float = 1.0  # rows that need a forward
    live: float = 1.0  # rows that have a gradient
    kept: float = KEPT  # entries a live row keeps: the sparse backward, and a support

    @property
    def gemms(self) -> int:
        """Products of rows x vocab x hidden that a dense call cannot avoid."""
        return {"logps": 1, "frozen": 2}.get(self.mode, 3)

    @property
    def product(self) -> float:
        """FLOP of one of them."""
        return 2.0 * self.rows * self.vocab * self.hidden


def bound(machine: Machine, case: Case) -> float:
    """Return the seconds of the products that a dense call cannot avoid, at the full rate.

    Rows that drop out are not in it. With a share b of the rows scored and a share a live, the
    share (2b + 4a) / 6 of a loss remains.
    """
    share = case.scored + (case.gemms - 1) * case.live
    return share * case.product / machine.rate


def forward(
    machine: Machine, case: Case, *, instructions: float = STATISTICS, written: float = 0.0
) -> float:
    """Return the seconds of the fused forward kernel, which writes `written` bytes per logit."""
    rows = round(case.scored * case.rows)
    if not rows:
        return 0.0
    logits = rows * case.vocab
    computed = gemm(machine, rows, case.vocab, case.hidden)
    computed += epilogue(machine, logits, instructions)
    return max(computed, (written * logits + 2 * case.vocab * case.hidden) / machine.bandwidth)


def backward_products(
    machine: Machine, case: Case, rows: int, chunk: int, *, piece: int | None = None
) -> float:
    """Return the seconds of dhidden and, unless the head is frozen, dweight over chunks of rows.

    Several chunks add to an fp32 dweight, which every chunk but the first reads and writes once
    more. In the same way every `piece` of the vocabulary but the first reads and writes dhidden
    once more, unless it stays in the L2.
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
    """Return the seconds on other GPUs: a library's fp32 tile, two passes over it, two products.

    The pass for the statistics reads 4 bytes per logit. The pass for the gradient reads 4 and
    writes 2. Rows without a gradient go through the forward kernel.
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
    products += backward_products(machine, case, live, chunk, piece=SLICE)
    return rest + products + 10 * logits / machine.bandwidth


def anchored_route(machine: Machine, case: Case) -> float:
    """Return the seconds on Hopper: a kernel that leaves 16-bit exponentials, and two products."""
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
    return rest + made + backward_products(machine, case, live, chunk)


def sparse_route(machine: Machine, case: Case, *, anchored: bool = True) -> float:
    """Return the seconds of the sparse backward: a forward that draws, then sums over kept entries.

    `anchored`: the forward kernel draws, and leaves a bit mask of V/8 bytes per row. Otherwise the
    library leaves an fp32 tile, which statistics and draw read once each.

    The sums over kept entries take what `entry_bytes` says.
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
    return rest + drawn + entry_bytes(case, entries) / machine.bandwidth


def entry_bytes(case: Case, entries: float) -> float:
    """Return the bytes that a few entries of each row move, from their logits to the gradients.

    An entry fetches its row of the weight twice, for its logit and for dhidden, and its row of
    hidden once, for dweight, all from memory. The entries are sorted in eight passes of 16 bytes,
    and a dense dweight is written.
    """
    fetched = 2 * case.hidden * entries * (2 + (case.gemms == 3))
    if case.gemms < 3:
        return fetched
    return fetched + 8 * 2 * 16 * entries + 2 * case.vocab * case.hidden


def support_route(machine: Machine, case: Case) -> float:
    """Return the seconds of a loss over a support of `case.kept` ids a row, all of them gathered.

    No product over the vocabulary is left: memory alone bounds it.
    """
    return entry_bytes(case, case.rows * case.kept) / machine.bandwidth


Route = Callable[[Machine, Case], float]
ROUTES: dict[str, Route] = {
    BOUND: bound,
    "fastgrpo triton": anchored_route,
    "fastgrpo triton, tiles": tile_route,
    "fastgrpo sparse": sparse_route,
    "fastgrpo sparse, tiles": lambda machine, case: sparse_route(machine, case, anchored=False),
}
# On a CPU everything but products is free, and only their number differs.
CPU_ROUTES: dict[str, Route] = {
    BOUND: bound,
    "fastgrpo torch": anchored_route,
    "fastgrpo sparse": sparse_route,
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


def case_of(shape: dict[str, Any], mode: str, kept: float = KEPT) -> Case:
    """Return the case of a record's shape and mode."""
    scored, live = SHARES.get(mode, (1.0, 1.0))
    kind = mode if mode in ("logps", "frozen", "token_logps") else "loss"
    return Case(shape["rows"], shape["vocab"], shape["hidden"], kind, scored, live, kept)
