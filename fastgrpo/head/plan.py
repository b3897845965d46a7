"""How the workspace is divided into tiles, and which kernels work on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.backend import Kernels
from fastgrpo_kernels import Head, Rows
from fastgrpo_kernels.runtime import multiprocessors

MIB = 2**20
CPU_CHUNK_ROWS = 320  # rows of a tile that holds all logits of its rows, on a CPU
CPU_WORKSPACE_MB = 32.0  # at least: of a small vocabulary more rows fit
GPU_CHUNK_ROWS = 8192
GPU_WORKSPACE_MB = 2560
SLICE = 8192  # columns of a tile that holds a slice of the vocabulary
CPU_SLICE_BYTES = 16 * MIB  # of a tile that should stay in cache after its GEMM
GEMM_ROWS, GEMM_COLUMNS = 128, 256  # the output tile of a GEMM on Hopper
# Adding a GEMM's result to a sum in memory takes as long as this many rows of that GEMM: 8 bytes
# per entry at an H200's 4.3 TB/s, against 2 operations per row and entry at its 790 TFLOP/s.
ACCUMULATION_ROWS = 735


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class VocabSlice(NamedTuple):
    """A slice of the vocabulary, in the dtypes that GEMMs take."""

    columns: slice
    weight: Tensor  # (Vs, H) in the operands' dtype, (Vs, H + K) with `Head.lora`
    bias: Tensor | None  # (Vs,) in the results' dtype


class Plan(NamedTuple):
    """The sizes of the tiles, and the kernels that work on them."""

    kernels: Kernels
    operand: torch.dtype  # of the GEMMs' inputs
    accumulator: torch.dtype  # of their results
    chunk: int  # rows of a tile that holds all logits of its rows
    chunk_width: int  # columns of that tile that one step works on
    slice_width: int  # columns of a tile that holds a slice of the vocabulary
    slice_rows: int  # rows of that tile
    exps_rows: int  # rows of a 16-bit tile that holds the exponentials of all their logits
    multiprocessors: int  # of the device
    sync_stalls: bool  # whether the host waits for the device when it looks at a value

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, workspace_mb: float | None, kernels: Kernels
    ) -> Plan:
        """Divide the workspace into tiles. Raises ValueError if it cannot hold a row of logits."""
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
        # With `Head.lora`, whose columns hidden states have too, slices are put together.
        copied = weight.dtype != accumulator or hidden.shape[1] > hidden_size
        chunk = budget
        if copied:
            # A slice of the weight and a slice of its gradient, both in fp32, may take half of the
            # workspace on a GPU and a quarter on a CPU.
            slices = budget // (2 if hidden.is_cuda else 4)
            width = max(1, min(width, slices // (2 * accumulator.itemsize * hidden.shape[1])))
            if not hidden.is_cuda:
                chunk -= 2 * accumulator.itemsize * hidden.shape[1] * width
        # The rest is for a tile and its exponentials.
        tile = budget // 4 if hidden.is_cuda else min(budget // 4, CPU_SLICE_BYTES)
        return cls(
            kernels=kernels,
            operand=operand,
            accumulator=accumulator,
            chunk=max(1, chunk // (vocab * per_logit)),
            # On a CPU every step is a parallel region, and each region waits for its last thread.
            chunk_width=width if hidden.is_cuda or copied else vocab,
            slice_width=width,
            slice_rows=max(1, tile // (width * per_logit)),
            exps_rows=max(1, budget // (padded(vocab) * hidden.dtype.itemsize)),
            multiprocessors=multiprocessors(hidden.device),
            sync_stalls=hidden.is_cuda,
        )

    @property
    def mixed(self) -> bool:
        """Whether the GEMMs turn 16-bit operands into fp32 results."""
        return self.operand != self.accumulator

    @property
    def fp16_tiles(self) -> bool:
        """Whether gradient tiles have the range of fp16, which `Scaling` brings them into."""
        return self.operand == torch.float16

    def exps_chunk(self, n: int, head: Head, needs: Needs) -> int:
        """Return the rows of an n-row pass that share a tile of exponentials."""
        hidden_size = head.weight.shape[1]
        return chunk_rows(n, self.exps_rows, hidden_size, self.multiprocessors, needs.weight)

    def new_tile(self, n: int, width: int, device: torch.device) -> Tensor:
        """Return an uninitialised tile of logits (n, width)."""
        return torch.empty((n, width), dtype=self.accumulator, device=device)

    def slices(self, head: Head, width: int) -> Iterator[VocabSlice]:
        """Yield the vocabulary slice by slice."""
        for columns in chunks(len(head.weight), width):
            bias = None if head.bias is None else head.bias[columns].to(self.accumulator)
            yield VocabSlice(columns, head.weight_rows(columns, self.operand), bias)

    def uses_anchored(self, rows: Rows, head: Head) -> bool:
        """Whether a kernel scores these rows anchored at their own logit."""
        return self.kernels.anchored_logps_fwd is not None and self.kernels.has_anchored(rows, head)


def chunk_rows(n: int, most: int, hidden_size: int, multiprocessors: int, accumulate: bool) -> int:
    """Return how many of n rows to take at once: chunks of about equal size, at most `most` rows.

    The result of the GEMM for dhidden has few tiles, so its last wave may leave multiprocessors
    idle. More chunks than necessary can fill that wave better. But each further chunk reads and
    writes the sum of dweight, if there is one (`accumulate`).
    """
    columns = -(-hidden_size // GEMM_COLUMNS)
    addition = ACCUMULATION_ROWS * hidden_size / (GEMM_ROWS * GEMM_COLUMNS) * accumulate

    def cost(count: int) -> float:
        """Time of the GEMMs for dhidden and of the additions to dweight, in units of a tile."""
        waves = -(-(-(-n // (count * GEMM_ROWS)) * columns) // multiprocessors)
        return count * waves * multiprocessors + (count - 1) * addition

    fewest = -(-n // most)
    count = min(range(fewest, fewest + 8), key=cost) if n else 1
    whole_tiles = -(-n // (count * GEMM_ROWS)) * GEMM_ROWS
    return max(1, min(n, most, whole_tiles))


def padded(vocab: int) -> int:
    """Return the row stride of 16-bit exponentials: every row begins at a multiple of 16 bytes."""
    return -(-vocab // 8) * 8


def default_workspace_mb(vocab: int, device_type: str) -> float:
    """Return the default workspace in MiB for the logits tiles.

    On a CPU: 320 rows of fp32 logits, but at least 32 MiB. On a GPU: 8192 rows of an fp32 and a
    16-bit tile, but at most 2.5 GiB, which is about 8192 rows of the 16-bit tile alone for a
    vocabulary of 151,936.
    """
    if device_type == "cpu":
        return max(CPU_WORKSPACE_MB, CPU_CHUNK_ROWS * vocab * 4 / MIB)
    return min(GPU_WORKSPACE_MB, GPU_CHUNK_ROWS * vocab * 6 / MIB)


def chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
