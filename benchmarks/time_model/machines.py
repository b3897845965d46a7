"""Time single steps on a machine: library products, and what a fused kernel adds to them."""

from __future__ import annotations

import math
from typing import NamedTuple

MIB = 1 << 20


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
    """Return a CPU. Its GEMM rate is the only constant: passes and epilogues are free."""
    return Machine("CPU", rate, math.inf, 1, 0, math.inf, source)


# Share of its rate that a library GEMM reaches by length of the contraction: triton's Gluon
# tutorial 07, cuBLAS column, H100, 540 588 616 646 661 TFLOP/s.
_EFFICIENCY = ((512, 0.817), (1024, 0.890), (2048, 0.932), (4096, 0.977), (8192, 1.0))
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
