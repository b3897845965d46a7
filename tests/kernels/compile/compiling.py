"""Compile every kernel for every supported architecture, without a GPU, and inspect the result.

This cannot show races, speed, or the specialisation that a launch chooses: tests/kernels/launch has
the last. Triton caches compiled kernels, so that compiling again is free.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgrpo_kernels.anchored_logps import (
    _anchor_rows_kernel,
    _anchored_logps_kernel,
    _finish_anchored_kernel,
    _list_rows_kernel,
)
from fastgrpo_kernels.entry_softmax import (
    _entry_dots_kernel,
    _entry_grads_kernel,
    _segment_softmax_kernel,
)
from fastgrpo_kernels.group_advantages import _group_stats_kernel
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS, KL_GRADIENTS
from fastgrpo_kernels.linear_logps import (
    _exps_kernel,
    _linear_logps_kernel,
    _merge_splits_kernel,
)
from fastgrpo_kernels.logits_tile import (
    _scatter_rows_kernel,
    _tile_grad_kernel,
    _tile_stats_kernel,
)
from fastgrpo_kernels.policy_loss import _segment_reduce_kernel, _token_loss_kernel
from fastgrpo_kernels.runtime import LAUNCHES, Launch, launch_for
from fastgrpo_kernels.sparse_entries import (
    _bag_sum_kernel,
    _compact_mask_kernel,
    _entry_logits_kernel,
    _tile_draw_kernel,
)
from fastgrpo_kernels.surrogates import SURROGATES


class Part(NamedTuple):
    target: GPUTarget
    arch: str  # class of the launch tables
    shared_limit: int  # bytes a block can have, from the vendors' tables
    matrix_instruction: str


PARTS = {
    "sm_80": Part(GPUTarget("cuda", 80, 32), "sm_80", 166_912, "mma.sync"),
    "sm_86": Part(GPUTarget("cuda", 86, 32), "sm_86", 101_376, "mma.sync"),
    "sm_89": Part(GPUTarget("cuda", 89, 32), "sm_86", 101_376, "mma.sync"),
    "sm_90": Part(GPUTarget("cuda", 90, 32), "sm_90", 232_448, "wgmma"),
    "sm_100": Part(GPUTarget("cuda", 100, 32), "sm_100", 232_448, "tcgen05.mma"),
    "sm_120": Part(GPUTarget("cuda", 120, 32), "sm_86", 101_376, "mma.sync"),
    "gfx942": Part(GPUTarget("hip", "gfx942", 64), "hip", 65_536, "v_mfma"),
}


class Case(NamedTuple):
    """A kernel, its entry in LAUNCHES and what a launch would pass to it.

    One argument for each that is not a block size, in order: a Triton type, or the value of a
    constant. "/16" marks what a launch finds to be a multiple of 16 on aligned tensors; a block
    size stands by its name, as in "tensordesc<bf16[BLOCK_N, BLOCK_H]>".
    """

    kernel: Any
    launch: str
    bits: int
    arguments: list[Any]

    @property
    def parts(self) -> list[str]:
        """Names of the parts that have an entry."""
        archs = {arch for bits, arch in LAUNCHES[self.launch] if bits == self.bits}
        return [name for name, part in PARTS.items() if archs & {part.arch, "any"}]


def _linear(
    dtype, bits, *, launch="linear_logps", weight=None, options=True, ragged=False, listed=False,
    precision="ieee",
):  # fmt: skip
    """`options`: with bias, softcap and entropy, the longest epilogue; otherwise none of them."""
    return Case(
        _linear_logps_kernel,
        launch,
        bits,
        [
            *(f"*{dtype}/16", f"*{weight or dtype}/16", "*i64/16"),
            *(f"*{weight or dtype}/16" if options else None, "*fp32/16"),
            *("*i32/16" if listed else None, "*i32/16" if listed else None, "*fp32/16"),
            *("i32", "i32", "i32" if ragged else "i32/16", "i32/16", "i32/16", "fp32", "fp32"),
            *(options, options, ragged, weight is not None, precision),
        ],
    )


def _anchored(
    *, launch="anchored_logps", dtype="bf16", options=False, exps=False, draw=False, h=1024,
    ragged=True,
):  # fmt: skip
    """`options`: with bias, temperatures, softcap and entropy, or with none of them."""
    specialised = launch == "anchored_logps_small_h"
    hidden = f"*{dtype}/16" if specialised else f"tensordesc<{dtype}[BLOCK_N, BLOCK_H]>"
    return Case(
        _anchored_logps_kernel,
        launch,
        16,
        [
            *(hidden, f"tensordesc<{dtype}[BLOCK_V, BLOCK_H]>", "*i64/16"),
            *(f"*{dtype}/16" if options else None, "*fp32/16" if options or exps else None),
            *("*fp32/16", "*i32/16" if draw else None, "*i32/16" if draw else None, "*fp32/16"),
            *("tensordesc<bf16[BLOCK_N, BLOCK_V]>" if exps else None, "*i32/16" if draw else None),
            *("i32", "i32/16", "i32/16", "i32/16", "fp32", "fp32"),
            *(h, ragged, options, options, False),
        ],
    )


def _token_loss(surrogate, kl="k3", gradient="value", separate=False):
    """With every optional tensor, the longest form."""
    rule = SURROGATES[surrogate]
    return Case(
        _token_loss_kernel,
        "token_loss",
        0,
        [
            *["*fp32/16"] * 9,
            *("*fp32/16" if separate else None, "*fp32/16", "i32"),
            tuple("fp32" for _ in rule.parameters),
            *["fp32"] * 3,
            *(rule.fn, KL_ESTIMATORS[kl].fn, KL_GRADIENTS[gradient].fn),
            *(rule.slope == "ratio", True),
        ],
    )


ROW = ["*fp32/16"]
LIST = ["*i32/16"] * 2
SIZES = ["i32/16"] * 4
TILE = ["*fp32/16", "*i64/16", "*bf16/16", "*fp32/16"]  # z, ids, bias, inv_temperature
HEAD = ["*bf16/16", "*bf16/16", "*bf16/16", "*fp32/16"]  # hidden, weight, bias, inv_temperature
TAIL = ["i32", "fp32", "fp32", True]  # vocab_start, logit_scale, softcap, SOFTCAP
GRAD = [*TILE, *ROW * 4]
CASES = {
    "linear-bf16": _linear("bf16", 16),
    "linear-fp32": _linear("fp32", 32),
    "linear-ragged": _linear("bf16", 16, launch="linear_logps_ragged_h", ragged=True),
    "linear-fp32-ragged": _linear("fp32", 32, launch="linear_logps_ragged_h", ragged=True),
    "anchored": _anchored(),
    "anchored-options": _anchored(options=True),
    "anchored-exps": _anchored(options=True, exps=True),
    "anchored-draw": _anchored(options=True, draw=True),
    "anchored_small_h": _anchored(launch="anchored_logps_small_h"),
    "anchored_small_h-options": _anchored(launch="anchored_logps_small_h", options=True),
    "anchor_rows": Case(
        _anchor_rows_kernel,
        "anchor_rows",
        0,
        [
            *("*bf16/16", "*bf16/16", "*i64/16", "*bf16/16", *ROW * 3, "i32", *SIZES),
            *("fp32", "fp32", "fp32", True),
        ],
    ),
    "finish_anchored": Case(
        _finish_anchored_kernel, "finish_anchored", 0, [*ROW * 7, "*i1/16", "i32", "i32"]
    ),
    "list_rows": Case(_list_rows_kernel, "list_rows", 0, ["*i1/16", *LIST, "i32"]),
    "merge": Case(
        _merge_splits_kernel,
        "merge_splits",
        0,
        [*ROW, "*i64/16", *LIST, *ROW * 3, "i32", "i32", 4096],
    ),
    "tile_stats": Case(
        _tile_stats_kernel,
        "tile_stats",
        0,
        [*TILE, *ROW * 4, "i32/16", "i32/16", *TAIL, True],
    ),
    "tile_grad-inplace": Case(
        _tile_grad_kernel,
        "tile_grad",
        0,
        [*GRAD, "*fp32/16", None, "i32/16", "i32/16", "i32/16", *TAIL],
    ),
    "tile_grad-bf16": Case(
        _tile_grad_kernel,
        "tile_grad",
        0,
        [*GRAD, "*bf16/16", "*fp32/16", "i32/16", "i32/16", "i32/16", *TAIL],
    ),
    "scatter_rows": Case(
        _scatter_rows_kernel,
        "scatter_rows",
        0,
        [*ROW, "*i64/16", "*i64/16", *ROW, "*bf16/16", "i32", "i32", *["i32/16"] * 3, "i32"],
    ),
    "tile_draw": Case(
        _tile_draw_kernel,
        "tile_draw",
        0,
        [*TILE, *ROW, *LIST, "*i32/16", *ROW, "*i32/16", *["i32/16"] * 3, *TAIL],
    ),
    "compact_mask": Case(
        _compact_mask_kernel, "compact_mask", 0, ["*i32/16", *LIST, *["i32/16"] * 3]
    ),
    "entry_logits": Case(
        _entry_logits_kernel,
        "entry_logits",
        0,
        [*HEAD, *LIST, *ROW, *SIZES, "fp32", "fp32", True],
    ),
    "target_logits": Case(
        _entry_logits_kernel,
        "target_logits",
        0,
        [*HEAD, "*i32/16", None, *ROW, 1, *["i32/16"] * 3, "fp32", "fp32", True],
    ),
    "bag_sum": Case(
        _bag_sum_kernel,
        "bag_sum",
        0,
        ["*bf16/16", "*bf16/16", "*i64/16", *ROW, "*i64/16", "i32", *["i32/16"] * 3],
    ),
    "bag_sum_column": Case(
        _bag_sum_kernel,
        "bag_sum_column",
        0,
        [*ROW, *ROW, "*i64/16", *ROW, "*i64/16", "i32", 1, 1, 1],
    ),
    "entry_dots": Case(
        _entry_dots_kernel,
        "entry_dots",
        0,
        [*ROW, "*bf16/16", "*i64/16", "*bf16/16", "*i64/16", "i32", *["i32/16"] * 3],
    ),
    "segment_softmax": Case(
        _segment_softmax_kernel,
        "segment_softmax",
        0,
        [*ROW, "*i64/16", "*i1/16", "*i64/16", "*bf16/16", *ROW * 4, "fp32", "fp32", True],
    ),
    "entry_grads": Case(
        _entry_grads_kernel,
        "entry_grads",
        0,
        [*ROW, "*i64/16", "*i1/16", *ROW * 8, "i32", "fp32", "fp32", True],
    ),
    "token_loss-ppo_clip": _token_loss("ppo_clip"),
    "token_loss-dppo_kl": _token_loss("dppo_kl", "k3", "importance", separate=True),
    "segment_sum": Case(
        _segment_reduce_kernel, "segment_reduce", 0, [*ROW, "*i32/16", *ROW, "sum"]
    ),
    "segment_max": Case(
        _segment_reduce_kernel, "segment_reduce", 0, [*ROW, "*i64/16", *ROW, "max"]
    ),
    "group_stats": Case(
        _group_stats_kernel,
        "group_advantages",
        0,
        [*ROW, None, "*i64/16", "*i64/16", *ROW, "i32", True],
    ),
    "group_stats-weighted": Case(
        _group_stats_kernel,
        "group_advantages",
        0,
        [*ROW * 2, "*i64/16", "*i64/16", *ROW, "i32", False],
    ),
}
# What changes the epilogue, the loads or the formula, but not the launch entry: on the part with
# the spill bar.
VARIANTS = {
    **{
        f"token_loss-{name}-{form}": _token_loss(name, separate=form == "separate")
        for name in SURROGATES
        for form in ("together", "separate")
    },
    **{
        f"token_loss-{kl}-{gradient}": _token_loss("ppo_clip", kl, gradient)
        for kl in KL_ESTIMATORS
        for gradient in KL_GRADIENTS
    },
    "linear-fp16": _linear("fp16", 16),
    "linear-bf16-listed": _linear("bf16", 16, listed=True),
    "merge-all": Case(
        _merge_splits_kernel,
        "merge_splits",
        0,
        [*ROW, "*i64/16", None, None, *ROW * 3, "i32", "i32", 4096],
    ),
    "exps": Case(
        _exps_kernel,
        "linear_logps_ragged_h",
        16,
        [
            *("*bf16/16", "*bf16/16", "*i64/16", "*bf16/16", *ROW * 2, *LIST, "*bf16/16"),
            *("i32", *SIZES, "i32/16", "fp32", "fp32", True, True, False, "ieee"),
        ],
    ),
    "linear-bf16-plain": _linear("bf16", 16, options=False),
    "linear-bf16-fp32": _linear("bf16", 32, weight="fp32"),
    "linear-tf32": _linear("fp32", 32, precision="tf32"),
    "anchored-fp16": _anchored(dtype="fp16"),
    "anchored-even": _anchored(ragged=False),
    "anchored-exps-plain": _anchored(exps=True),
    "anchored-draw-plain": _anchored(draw=True),
}

# A launch turns a size or stride of 1 into a constant. What can be 1 together: a vocabulary of one
# entry, and where the launch takes any hidden size, one column.
ONE_ENTRY = ("V", "Vs", "stride_z", "stride_out")
ONE_COLUMN = ("H", "stride_hidden", "stride_weight", "stride_acc", "stride_rows", "stride_table")
SIZES_OF_ONE = {
    "linear-bf16": ONE_ENTRY,
    "linear-fp32": ONE_ENTRY,
    "linear-ragged": ONE_ENTRY + ONE_COLUMN,
    "linear-fp32-ragged": ONE_ENTRY + ONE_COLUMN,
    "merge": ONE_ENTRY,
    "exps": ONE_ENTRY + ONE_COLUMN,
    "anchored-options": ONE_ENTRY,
    "anchor_rows": ONE_ENTRY,
    "tile_stats": ONE_ENTRY,
    "tile_grad-bf16": ONE_ENTRY,
    "scatter_rows": ONE_ENTRY + ONE_COLUMN,
    "bag_sum": ONE_COLUMN,
    "entry_dots": ONE_COLUMN,
}


def with_sizes_of_one(name: str) -> Case:
    """Return a case as a launch with sizes of 1 specialises it."""
    case = (CASES | VARIANTS)[name]
    arguments = zip(case.kernel.arg_names, case.arguments, strict=False)  # block sizes come last
    return case._replace(
        arguments=[1 if x in SIZES_OF_ONE[name] else kind for x, kind in arguments]
    )


def compile_case(case: Case, launch: Launch, part: Part) -> Any:
    """Return the case compiled with a launch that need not be the table's."""
    options = launch.kwargs()
    blocks = {name: options.pop(name) for name in launch.blocks}
    arguments = [name for name in case.kernel.arg_names if name not in blocks]
    given = dict(zip(arguments, case.arguments, strict=True)) | blocks
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        kind = given[name]
        if isinstance(kind, tuple):
            signature[name] = kind
        elif isinstance(kind, str) and re.match(r"\*|i\d+|fp32|tensordesc", kind):
            kind = re.sub(r"BLOCK_\w", lambda block: str(blocks[block[0]]), kind)
            signature[name] = kind.removesuffix("/16")
            if kind.endswith("/16"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = kind
    source = ASTSource(case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=part.target, options=options)


@cache
def compiled(name: str, part: str) -> Any:
    """Return a case or variant compiled for a part with the table's launch."""
    case = (CASES | VARIANTS)[name]
    launch = launch_for(case.launch, case.bits, PARTS[part].arch)
    return compile_case(case, launch, PARTS[part])


def assembly(kernel: Any) -> str:
    return kernel.asm.get("ptx") or kernel.asm["amdgcn"]


class Usage(NamedTuple):
    """What a compiled kernel takes and what it is made of."""

    registers: int  # per thread; AMD: vector registers
    stack: int  # bytes of memory per thread: what does not fit in registers lives there
    shared: int  # bytes per block
    instructions: int  # with the padding to whole cache lines
    matrix: str  # instructions of the matrix units
    tma: str  # "load", "store" or both
    specialised: bool  # a producer warp beside the ones that compute
    fp64: int
    atomics: int


def usage(kernel: Any) -> Usage:
    code = assembly(kernel)
    if "cubin" in kernel.asm:
        listed = tool("cuobjdump", "--dump-resource-usage", kernel=kernel)
        registers, stack = (int(re.search(rf"\b{x}:(\d+)", listed)[1]) for x in ("REG", "STACK"))
        instructions = _instructions(kernel.asm["cubin"])
    else:
        registers, stack = (
            int(re.search(rf"\.{x}: +(\d+)", code)[1])
            for x in ("vgpr_count", "private_segment_fixed_size")
        )
        instructions = len(re.findall(r"^\t[a-z]\w+", code, re.MULTILINE))
    ways = {r"shared::\w+\.global": "load", r"global\.shared::cta": "store"}
    tma = [way for spaces, way in ways.items() if re.search(rf"bulk\.tensor\.\wd\.{spaces}", code)]
    matrix = re.findall(r"\b(?:mma\.sync|wgmma\.mma|tcgen05\.mma|v_mfma)[\w.:]*", code)
    return Usage(
        registers,
        stack,
        kernel.metadata.shared,
        instructions,
        " ".join(sorted(set(matrix))),
        " ".join(tma),
        "ttg.warp_specialize" in kernel.asm["ttgir"],
        len(re.findall(r"\.f64|_f64", code)),
        len(re.findall(r"\b(?:atom|red)\.|_atomic_", code)),
    )


def tool(name: str, *flags: str, kernel: Any) -> str:
    """Return what one of the CUDA tools that come with Triton says about a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, *flags, cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(cubin: bytes) -> int:
    """Instructions, 16 bytes each, in the executable sections of an ELF file.

    A disassembler tells the same in half a second.
    """
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    executable = 4
    return sum(length for _, _, flags, _, _, length in headers if flags & executable) // 16
