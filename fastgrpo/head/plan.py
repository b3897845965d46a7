"""How a budget of memory becomes tiles, and which kernels work on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.backend import Kernels
from fastgrpo_kernels import Head, Rows
from fastgrpo_kernels.runtime import multiprocessors

MIB = 2**20
CPU_CHUNK_ROWS = 256  # of a CPU's tile that holds all logits of its rows
GPU_CHUNK_ROWS = 8192
GPU_WORKSPACE_MB = 2560
SLICE = 8192  # columns of a tile that holds some of the logits
CPU_CHUNK_SLICE = 32768  # columns of one that holds all of them and is worked on where it lies
CPU_SLICE_BYTES = 16 * MIB  # of such a tile: what stays in cache between its GEMM and the rest
GEMM_ROWS, GEMM_COLUMNS = 128, 256  # of the tile in which a Hopper GEMM makes its result
# Adding a GEMM's result to a sum in memory costs as much time as so many rows of that GEMM: 8 bytes
# per entry at an H200's 4.3 TB/s, next to 2 operations per row and entry at its 790 TFLOP/s.
ACCUMULATION_ROWS = 735


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class VocabSlice(NamedTuple):
    """A slice of the vocabulary, in the dtypes that GEMMs take."""

    columns: slice
    weight: Tensor  # (Vs, H) in the operands' dtype
    bias: Tensor | None  # (Vs,) in the results' dtype


class Plan(NamedTuple):
    """How a workspace budget is spent, and on whose kernels."""

    kernels: Kernels
    operand: torch.dtype  # of the GEMMs' inputs
    accumulator: torch.dtype  # of their results
    chunk: int  # rows of a tile that holds all logits of its rows
    chunk_width: int  # columns of it that one step works on
    slice_width: int  # columns of a tile that holds some logits
    slice_rows: int  # and its rows
    exps_rows: int  # rows of a 16-bit tile that holds the exponentials of all their logits
    multiprocessors: int  # of the device
    fp32_dweight: bool  # whether a 16-bit dweight may be summed in fp32, in its whole size
    sync_stalls: bool  # whether the host waits for the device when it looks at a value

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, workspace_mb: float | None, kernels: Kernels
    ) -> Plan:
        """Divide the budget into tiles. Raises ValueError if it holds not even a row of logits."""
        vocab, hidden_size = weight.shape
        accumulator = torch.promote_types(hidden.dtype, torch.float32)
        # cuBLAS multiplies 16-bit operands into fp32 results. CPUs cannot, and without AMX their
        # bf16 GEMMs are slower by orders of magnitude: they get fp32 operands, converted slice by
        # slice.
        native = hidden.is_cuda and torch.version.hip is None and hidden.dtype == weight.dtype
        operand = hidden.dtype if native else accumulator
        per_logit = accumulator.itemsize + (operand.itemsize if operand != accumulator else 0)
        default = default_workspace_mb(vocab, hidden.device.type) * accumulator.itemsize / 4
        budget = int((default if workspace_mb is None else workspace_mb) * MIB)
        if budget < vocab * per_logit:
            need = vocab * per_logit / MIB
            raise ValueError(
                f"workspace_mb: expected at least {need:.3g} MiB, one row of {vocab} logits; "
                f"got {workspace_mb}"
            )
        width = min(vocab, SLICE)
        copied = weight.dtype != accumulator
        if copied:
            # A slice of the weight and one of its gradient, both in fp32, may take half of the
            # budget.
            width = max(1, min(width, budget // (4 * accumulator.itemsize * hidden_size)))
        # The other half: a tile, and its exponentials.
        tile = budget // 4 if hidden.is_cuda else min(budget // 4, CPU_SLICE_BYTES)
        return cls(
            kernels=kernels,
            operand=operand,
            accumulator=accumulator,
            chunk=budget // (vocab * per_logit),
            chunk_width=width if hidden.is_cuda or copied else CPU_CHUNK_SLICE,
            slice_width=width,
            slice_rows=max(1, tile // (width * per_logit)),
            exps_rows=max(1, budget // (padded(vocab) * hidden.dtype.itemsize)),
            multiprocessors=multiprocessors(hidden.device),
            fp32_dweight=hidden.is_cuda,
            sync_stalls=hidden.is_cuda,
        )

    @property
    def mixed(self) -> bool:
        """Whether the GEMMs turn 16-bit operands into fp32 results."""
        return self.operand != self.accumulator

    def one_pass(self, n: int, head: Head, needs: Needs) -> bool:
        """Whether `logps_and_grads` suits: not where only two phases keep their memory promise.

        Over several chunks a 16-bit dweight needs an fp32 accumulator of its size, which GPUs
        spend for 6NVH instead of 8NVH, and CPUs, where fp32 operands are copies as well, do not.
        """
        by_slice = needs.weight and head.weight.dtype != self.accumulator
        return n <= self.chunk or not by_slice or self.fp32_dweight

    def exps_chunk(self, n: int, head: Head, needs: Needs) -> int:
        """Return the rows of an n-row pass that share a tile of exponentials."""
        hidden_size = head.weight.shape[1]
        return chunk_rows(n, self.exps_rows, hidden_size, self.multiprocessors, needs.weight)

    def new_tile(self, n: int, width: int, device: torch.device) -> Tensor:
        """Return an uninitialised tile of logits (n, width)."""
        shape = (n, width) if self.kernels.ROW_MAJOR_TILES else (width, n)
        tile = torch.empty(shape, dtype=self.accumulator, device=device)
        return tile if self.kernels.ROW_MAJOR_TILES else tile.t()

    def slices(self, head: Head, width: int) -> Iterator[VocabSlice]:
        """Yield the vocabulary slice by slice."""
        for columns in chunks(len(head.weight), width):
            bias = None if head.bias is None else head.bias[columns].to(self.accumulator)
            yield VocabSlice(columns, head.weight[columns].to(self.operand), bias)

    def uses_anchored(self, rows: Rows, head: Head) -> bool:
        """Whether a kernel scores these rows anchored at their own logit."""
        return self.kernels.anchored_logps_fwd is not None and self.kernels.has_anchored(rows, head)


def chunk_rows(n: int, most: int, hidden_size: int, multiprocessors: int, accumulate: bool) -> int:
    """Return how many of n rows to take at once: about as many each time, and at most `most`.

    More chunks than necessary pay where the GEMM for dhidden, whose result has few tiles, then
    fills its last wave of multiprocessors. Each further chunk adds to dweight, if there is one.
    """
    columns = -(-hidden_size // GEMM_COLUMNS)
    addition = ACCUMULATION_ROWS * hidden_size / (GEMM_ROWS * GEMM_COLUMNS) * accumulate

    def cost(count: int) -> float:
        """Time of the GEMMs for dhidden, and of the additions to dweight, in GEMM tiles."""
        waves = -(-(-(-n // (count * GEMM_ROWS)) * columns) // multiprocessors)
        return count * waves * multiprocessors + (count - 1) * addition

    fewest = -(-n // most)
    count = min(range(fewest, fewest + 8), key=cost) if n else 1
    whole_tiles = -(-n // (count * GEMM_ROWS)) * GEMM_ROWS
    return max(1, min(n, most, whole_tiles))


def padded(vocab: int) -> int:
    """Return the width of a row of 16-bit exponentials that begins, like the next, at 16 bytes."""
    return -(-vocab // 8) * 8


def default_workspace_mb(vocab: int, device_type: str) -> float:
    """Return the default budget in MiB for the logits tiles.

    A CPU gets 256 rows of fp32 logits. A GPU gets 8192 rows of an fp32 and a 16-bit tile, and at
    most 2.5 GiB: 8192 rows of the 16-bit tile alone, for a vocabulary of 151,936 or more.
    """
    if device_type == "cpu":
        return CPU_CHUNK_ROWS * vocab * 4 / MIB
    return min(GPU_WORKSPACE_MB, GPU_CHUNK_ROWS * vocab * 6 / MIB)


def chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
