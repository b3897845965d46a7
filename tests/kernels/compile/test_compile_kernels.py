"""Every kernel, launch entry and surrogate compiled for every part we name, without a GPU.

What this cannot see: races, speed, and the specialisation that a real launch chooses.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgrpo_kernels.group_advantages import _group_stats_kernel
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS, KL_GRADIENTS
from fastgrpo_kernels.linear_logps import _linear_logps_kernel, _merge_splits_kernel
from fastgrpo_kernels.logits_tile import (
    _scatter_rows_kernel,
    _tile_grad_kernel,
    _tile_stats_kernel,
)
from fastgrpo_kernels.policy_loss import _segment_reduce_kernel, _token_loss_kernel
from fastgrpo_kernels.runtime import LAUNCHES, Launch, launch_for
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
    kernel: Any
    launch: str  # name in LAUNCHES
    bits: int
    # One entry per argument that is not a block size, in order: a Triton type, or the value of a
    # constant. "/16" marks what a launch finds to be a multiple of 16 on aligned tensors.
    arguments: list[Any]


def _linear(
    dtype, bits, *, launch="linear_logps", weight=None, options=True, ragged=False, precision="ieee"
):
    """`options`: with bias, softcap and entropy, the longest epilogue; otherwise none of them."""
    return Case(
        _linear_logps_kernel,
        launch,
        bits,
        [
            *(f"*{dtype}/16", f"*{weight or dtype}/16", "*i64/16"),
            *(f"*{weight or dtype}/16" if options else None, "*fp32/16", "*fp32/16"),
            *("i32", "i32", "i32" if ragged else "i32/16", "i32/16", "i32/16", "fp32", "fp32"),
            *(options, options, ragged, weight is not None, precision),
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
TILE = ["*fp32/16", "*i64/16", "*bf16/16", "*fp32/16"]  # z, ids, bias, inv_temperature
TAIL = ["i32", "fp32", "fp32", True]  # vocab_start, logit_scale, softcap, SOFTCAP
GRAD = [*TILE, *ROW * 4]
CASES = {
    "linear-bf16": _linear("bf16", 16),
    "linear-fp32": _linear("fp32", 32),
    "linear-ragged": _linear("bf16", 16, launch="linear_logps_ragged_h", ragged=True),
    "linear-fp32-ragged": _linear("fp32", 32, launch="linear_logps_ragged_h", ragged=True),
    "merge": Case(
        _merge_splits_kernel,
        "merge_splits",
        0,
        [*ROW, "*i64/16", *ROW * 3, "i32", "i32", 4096],
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
    "linear-bf16-plain": _linear("bf16", 16, options=False),
    "linear-bf16-fp32": _linear("bf16", 32, weight="fp32"),
    "linear-tf32": _linear("fp32", 32, precision="tf32"),
}


def _compile(case: Case, launch: Launch, part: Part) -> Any:
    options = launch.kwargs()
    blocks = {name: options.pop(name) for name in launch.blocks}
    arguments = [name for name in case.kernel.arg_names if name not in blocks]
    given = dict(zip(arguments, case.arguments, strict=True)) | blocks
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        kind = given[name]
        if isinstance(kind, tuple):
            signature[name] = kind
        elif isinstance(kind, str) and re.match(r"\*|i\d+|fp32", kind):
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
    case = (CASES | VARIANTS)[name]
    launch = launch_for(case.launch, case.bits, PARTS[part].arch)
    return _compile(case, launch, PARTS[part])


def assembly(kernel: Any) -> str:
    return kernel.asm.get("ptx") or kernel.asm["amdgcn"]


def stack_bytes(kernel: Any, folder: Path) -> int:
    """Bytes of local memory per thread: what does not fit in registers lives there."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CASES)
def test_fits_and_stays_deterministic(name, part):
    kernel = compiled(name, part)
    assert kernel.metadata.shared <= PARTS[part].shared_limit
    code = assembly(kernel)
    assert not re.search(r"\.f64|_f64", code), "fp64 arithmetic"
    assert not re.search(r"\b(atom|red)\.|_atomic_", code), "an atomic: the order would vary"


@pytest.mark.parametrize("name", [*CASES, *VARIANTS])
def test_sm_90_spills_nothing(name, tmp_path):
    kernel = compiled(name, "sm_90")
    assert stack_bytes(kernel, tmp_path) == 0
    assert not re.search(r"\.f64", assembly(kernel)), "fp64 arithmetic"


@pytest.mark.parametrize("part", PARTS)
def test_16_bit_gemm_uses_matrix_units(part):
    for name in ("linear-bf16", "linear-ragged"):
        assert PARTS[part].matrix_instruction in assembly(compiled(name, part)), name


@pytest.mark.parametrize("name", ["linear-fp32", "linear-bf16-fp32"])
def test_fp32_gemm_is_not_tf32(name):
    assert not re.search(r"tf32|mma", assembly(compiled(name, "sm_90")))
    assert "tf32" in assembly(compiled("linear-tf32", "sm_90")), "asked for, it would be seen"


def test_16_bit_gemm_loads_16_bytes_at_a_time():
    copies = re.findall(
        r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+|\d+),",
        assembly(compiled("linear-bf16", "sm_90")),
    )
    assert copies and all(int(size, 0) == 16 for size in copies)


def test_rows_are_addressed_in_64_bits():
    """N * H and V * H pass 2**31 on real heads."""
    ir = compiled("linear-bf16", "sm_90").asm["ttir"]
    for stride in ("stride_hidden", "stride_weight"):
        assert re.search(rf"%{stride}\w*\b.*i64", ir), stride


def test_a_spill_would_be_seen(tmp_path):
    """The bar of `test_sm_90_spills_nothing` can fail: half of the warps do not hold the tile."""
    blocks = LAUNCHES["linear_logps"][16, "sm_90"].blocks
    cramped = Launch(blocks, num_warps=4, num_stages=3)
    kernel = _compile(VARIANTS["linear-bf16-plain"], cramped, PARTS["sm_90"])
    assert stack_bytes(kernel, tmp_path) > 0


def test_every_launch_entry_is_compiled():
    reached = {
        (case.launch, id(launch_for(case.launch, case.bits, part.arch)))
        for case in CASES.values()
        for part in PARTS.values()
    }
    for kernel, entries in LAUNCHES.items():
        for (_, arch), launch in entries.items():
            assert arch == "interpreter" or (kernel, id(launch)) in reached, (kernel, arch)
