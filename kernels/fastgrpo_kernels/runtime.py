"""The import of Triton, which may be absent, and every launch setting.

Other modules write `from .runtime import jit, tl`. Without Triton `jit` returns the plain function:
the package still imports, `surrogates` serves the torch backend, and launchers raise.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    # Triton decides whether a kernel is compiled or interpreted when it decorates it. This reads
    # the same setting at the same moment, so both agree for as long as the process lives.
    INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
except ImportError:
    triton = tl = None
    HAS_TRITON = INTERPRETED = False


def switch(name: str, default: bool) -> bool:
    """Whether an environment variable, read now, turns something on: 1 does, 0 does not.

    `default` is what an unset one means. Raises ValueError for any other value.
    """
    value = os.environ.get(name)
    if value not in (None, "0", "1"):
        raise ValueError(f"{name}: expected 0 or 1, or no such variable, got {value!r}")
    return default if value is None else value == "1"


def jit(fn: Callable | None = None, **options: Any) -> Callable:
    """`triton.jit`, or the function itself where Triton is absent."""
    if fn is None:
        return lambda decorated: jit(decorated, **options)
    return triton.jit(fn, **options) if HAS_TRITON else fn


@dataclass(frozen=True)
class Launch:
    """Block sizes of one kernel, with the warps and pipeline stages they were chosen for."""

    blocks: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1  # only loops around `tl.dot` are pipelined

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of a launch: block sizes and compiler options."""
        # Triton's default for fused multiply-adds is about to change: results must not change too.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**self.blocks, **options, "enable_fp_fusion": True}


def _gemm(rows: int, vocab: int, hidden: int, num_warps: int, num_stages: int) -> Launch:
    blocks = {"BLOCK_N": rows, "BLOCK_V": vocab, "BLOCK_H": hidden, "SPLIT_V": 4096, "GROUP_N": 16}
    return Launch(blocks, num_warps, num_stages)


def _persistent(vocab: int, num_warps: int, num_stages: int, warp_specialize=False) -> Launch:
    blocks = {"BLOCK_N": 128, "BLOCK_V": vocab, "BLOCK_H": 64, "GROUP_N": 16}
    # In a flattened loop the loads of the next tile are in flight during the epilogue of this one.
    # Warp specialisation achieves the same, and the compiler does it only in a loop that is not
    # flattened.
    flags = {"FLATTEN": not warp_specialize, "WARP_SPECIALIZE": warp_specialize}
    return Launch(blocks | flags, num_warps, num_stages)


# Large enough that the interpreter is not too slow, and small enough that small shapes have
# several blocks and splits.
_INTERPRETED_GEMM = Launch(
    {"BLOCK_N": 64, "BLOCK_V": 256, "BLOCK_H": 64, "SPLIT_V": 512, "GROUP_N": 2}
)

ANCHORED_SMALL_H = 1536

# Kernel -> (bits of the dot operands, architecture class) -> launch, with 0 bits where the kernel
# has no dot and "any" where the architecture does not matter. No entry depends on the number of
# rows: otherwise the last bits of a row's result would depend on the batch around it.
LAUNCHES: dict[str, dict[tuple[int, str], Launch]] = {
    "linear_logps": {
        # 144 KiB of the 227: the widest accumulator that leaves registers for the epilogue.
        (16, "sm_90"): _gemm(128, 256, 64, num_warps=8, num_stages=3),
        # The accumulator has its own memory, but the epilogue reads it into registers at once.
        (16, "sm_100"): _gemm(128, 128, 64, num_warps=8, num_stages=4),
        # mma.sync takes its operands from registers too: half the width of Hopper's tile.
        (16, "sm_80"): _gemm(128, 128, 64, num_warps=8, num_stages=4),
        # 96 KiB of the 99 that a block has on these parts.
        (16, "sm_86"): _gemm(128, 128, 64, num_warps=8, num_stages=4),
        # 32 KiB of the 64: one stage in LDS, the next one in registers.
        (16, "hip"): _gemm(128, 128, 64, num_warps=8, num_stages=2),
        # fp32 dots are plain multiply-adds with operands in registers: the largest tile that fits
        # on every part and with every supported Triton.
        (32, "any"): _gemm(64, 32, 32, num_warps=4, num_stages=2),
        (16, "interpreter"): _INTERPRETED_GEMM,
        (32, "interpreter"): _INTERPRETED_GEMM,
    },
    # Masks in the inner loop need registers that the wide tiles do not leave. H is a multiple of
    # 64 in common models, so one entry that fits everywhere is enough.
    "linear_logps_ragged_h": {
        (16, "any"): _gemm(128, 128, 32, num_warps=8, num_stages=3),
        (32, "any"): _gemm(64, 32, 32, num_warps=4, num_stages=2),
        (16, "interpreter"): _INTERPRETED_GEMM,
        (32, "interpreter"): _INTERPRETED_GEMM,
    },
    "anchored_logps": {
        # 144 KiB of the 227, and 64 more where a tile is stored as well. 128 columns and 4 warps
        # leave room for two blocks per multiprocessor, but read a third more per product.
        (16, "sm_90"): _persistent(256, num_warps=8, num_stages=3),
        # The accumulator is read into registers at once, as in linear_logps: 256 columns spill.
        (16, "sm_100"): _persistent(128, num_warps=8, num_stages=4),
        (16, "interpreter"): Launch(
            {"BLOCK_N": 32, "BLOCK_V": 128, "BLOCK_H": 64, "GROUP_N": 2}
            | {"FLATTEN": True, "WARP_SPECIALIZE": False}
        ),
    },
    # A producer warp and two consumer groups, for H up to ANCHORED_SMALL_H and log-probs alone.
    # There the epilogue is a quarter of the work, so that hiding it should pay. This is a
    # prediction, not a measurement: `anchored_variant` takes the entry only where it is asked to.
    "anchored_logps_small_h": {
        (16, "sm_90"): _persistent(256, num_warps=4, num_stages=3, warp_specialize=True)
    },
    # 8 gathered weight rows in flight per program.
    "anchor_rows": {
        (0, "any"): Launch({"BLOCK_N": 8, "BLOCK_H": 256}),
        (0, "interpreter"): Launch({"BLOCK_N": 16, "BLOCK_H": 64}),
    },
    # Few rows and many tiles at a time: a row has hundreds of partials, and reading them one after
    # the other would wait for memory hundreds of times.
    "finish_anchored": {
        (0, "any"): Launch({"BLOCK_T": 32, "BLOCK_N": 32}),
        (0, "interpreter"): Launch({"BLOCK_T": 4, "BLOCK_N": 32}),
    },
    # One program walks over all rows.
    "list_rows": {
        (0, "any"): Launch({"BLOCK_N": 2048}, num_warps=8),
        (0, "interpreter"): Launch({"BLOCK_N": 64}),
    },
    # Three floats per row and split: bound by latency, so few rows per program.
    "merge_splits": {(0, "any"): Launch({"BLOCK_N": 128})},
    # Bound by memory, 16 bytes per lane and load: 2048 columns keep two loads of each lane in
    # flight, and several programs per multiprocessor hide the reductions.
    "tile_stats": {
        (0, "any"): Launch({"BLOCK_V": 2048}),
        (0, "interpreter"): Launch({"BLOCK_V": 512}),
    },
    "tile_grad": {
        (0, "any"): Launch({"BLOCK_V": 2048}),
        (0, "interpreter"): Launch({"BLOCK_V": 512}),
    },
    # 8 rows of 256 columns per step: enough loads in flight for runs of a frequent token.
    "scatter_rows": {
        (0, "any"): Launch({"POSITIONS": 8, "BLOCK_R": 8, "BLOCK_H": 256}),
        (0, "interpreter"): Launch({"POSITIONS": 4, "BLOCK_R": 4, "BLOCK_H": 64}),
    },
    # Like tile_stats; the running count ties the blocks together.
    "tile_draw": {
        (0, "any"): Launch({"BLOCK_V": 2048}),
        (0, "interpreter"): Launch({"BLOCK_V": 512}),
    },
    # 4 KiB of bits a step, of which a handful are set.
    "compact_mask": {
        (0, "any"): Launch({"BLOCK_W": 1024}),
        (0, "interpreter"): Launch({"BLOCK_W": 8}),
    },
    # 16 gathered weight rows in flight.
    "entry_logits": {
        (0, "any"): Launch({"BLOCK_E": 16, "BLOCK_H": 256}),
        (0, "interpreter"): Launch({"BLOCK_E": 4, "BLOCK_H": 64}),
    },
    "target_logits": {
        (0, "any"): Launch({"BLOCK_E": 1, "BLOCK_H": 1024}),
        (0, "interpreter"): Launch({"BLOCK_E": 1, "BLOCK_H": 64}),
    },
    # Most bags of a vocabulary are empty: a program looks at several.
    "bag_sum": {
        (0, "any"): Launch({"BAGS": 8, "BLOCK_E": 16, "BLOCK_H": 256}),
        (0, "interpreter"): Launch({"BAGS": 4, "BLOCK_E": 16, "BLOCK_H": 64}),
    },
    # A table of one column has no use for lanes: the entries of a bag take them.
    "bag_sum_column": {
        (0, "any"): Launch({"BAGS": 8, "BLOCK_E": 128, "BLOCK_H": 1}, num_warps=1),
        (0, "interpreter"): Launch({"BAGS": 4, "BLOCK_E": 8, "BLOCK_H": 1}),
    },
    # As entry_logits, with products in registers until the last column.
    "entry_dots": {
        (0, "any"): Launch({"BLOCK_E": 16, "BLOCK_H": 256}),
        (0, "interpreter"): Launch({"BLOCK_E": 128, "BLOCK_H": 64}),
    },
    # Most rows keep a handful of entries.
    "segment_softmax": {
        (0, "any"): Launch({"BLOCK_E": 256}, num_warps=1),
        (0, "interpreter"): Launch({"BLOCK_E": 128}),
    },
    "entry_grads": {
        (0, "any"): Launch({"BLOCK_E": 512}),
        (0, "interpreter"): Launch({"BLOCK_E": 128}),
    },
    "token_loss": {
        (0, "any"): Launch({"BLOCK_N": 512}),
        (0, "interpreter"): Launch({"BLOCK_N": 128}),
    },
    # Sequences of a few hundred to some thousand tokens, one program each.
    "segment_reduce": {
        (0, "any"): Launch({"BLOCK_N": 1024}),
        (0, "interpreter"): Launch({"BLOCK_N": 32}),
    },
    # Groups of 4 to 64 completions; larger ones loop.
    "group_advantages": {
        (0, "any"): Launch({"BLOCK_G": 64}, num_warps=1),
        (0, "interpreter"): Launch({"BLOCK_G": 8}),
    },
}


def obstacle(device: torch.device) -> str:
    """Why no kernel runs on a device; "" where they run.

    They run on ROCm and from compute capability 8.0 on, and interpreted anywhere.
    """
    if not HAS_TRITON:
        return (
            "the Triton kernels need the triton package (pip install triton); backend='torch' does"
            " not"
        )
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return (
            f"the Triton kernels need tensors on a CUDA or ROCm device, got {device}; to interpret"
            " them on a CPU set TRITON_INTERPRET=1 before importing fastgrpo"
        )
    if torch.version.hip:
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the Triton kernels need compute capability 8.0 or newer, got {major}.{minor}"
    if major == 10 and _triton_version() < (3, 7):
        # A product of tiles is wrong in some configurations: Triton's issue 9871.
        return f"compute capability {major}.{minor} needs Triton 3.7, got {triton.__version__}"
    return ""


def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def architecture(device: torch.device) -> str:
    """Architecture class of a device: "sm_80", "sm_86", "sm_90", "sm_100", "hip", "interpreter".

    "sm_86" stands for every part whose blocks have 99 KiB of shared memory: 8.6, 8.9 and 12.x.
    Raises RuntimeError where no kernel can run.
    """
    if reason := obstacle(device):
        raise RuntimeError(reason)
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 12: "sm_86"}.get(major, "sm_100")


def launch_for(kernel: str, bits: int, arch: str) -> Launch:
    """The table's entry for a kernel, operand bits (0: no dot) and architecture class."""
    table = LAUNCHES[kernel]
    return table.get((bits, arch)) or table[bits, "any"]


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run at once; few where it is interpreted."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def capturing(device: torch.device) -> bool:
    """Whether launches on a device go into a CUDA graph: nothing can be compared then."""
    with _current(device):
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a device the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class LaunchError(RuntimeError):
    """A kernel that cannot be launched. Nothing of it has run, and the device is as it was."""


# What the driver says of a kernel that it cannot load or start. Everything else that it says may be
# the late news of an earlier kernel, after which the device cannot be used.
_REFUSALS = (
    "invalid argument",
    "device kernel image is invalid",
    "no kernel image is available for execution on the device",
    "PTX JIT compiler library not found",
    "a PTX JIT compilation failed",
    "the provided PTX was compiled with an unsupported toolchain",
    "too many resources requested for launch",
    "Failed to create tensor map descriptor",
)

# What Triton says where it cannot compile.
_OF_THE_COMPILER = (
    "PassManager::run failed",
    "failed to translate module to LLVM IR",
    "Failed to find C compiler",
    "Cannot find ptxas",
    "Could not create or locate cache dir",
    "libcuda.so cannot found",
)


def launch(
    kernel: Any, grid: tuple[int, ...], entry: Launch, device: torch.device, /, **arguments: Any
) -> Any:
    """Launch a kernel on a device with the settings of an entry; return what Triton returns.

    A grid without programs launches nothing. Raises LaunchError for what fails before the device
    runs: a compiler, a missing tool, too few resources. Errors of the device pass unchanged.
    """
    if 0 in grid:
        return None
    try:
        # Triton launches on the current device, not where the data is.
        with _current(device):
            return kernel[grid](**arguments, **entry.kwargs())
    except Exception as error:
        if INTERPRETED or not _before_the_device(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise LaunchError(f"{kernel.fn.__name__} cannot be launched: {reason}") from error


def _before_the_device(error: Exception) -> bool:
    """Whether an error of a launch came from the host, before the kernel could run."""
    # Triton's own errors, its C compiler's, and files: a cache that cannot be written, or loaded
    # from.
    kinds = (triton.TritonError, subprocess.CalledProcessError, OSError, ImportError)
    if isinstance(error, kinds):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error)
    if said.startswith("Triton Error"):
        return any(refusal in said for refusal in _REFUSALS)
    return any(failure in said for failure in _OF_THE_COMPILER)


def dot_precision(bits: int) -> str:
    """`input_precision` of `tl.dot`: TF32 only for fp32 operands and where PyTorch allows it."""
    asked = torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip
    return "tf32" if bits == 32 and asked else "ieee"
