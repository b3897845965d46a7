"""Every kernel, launch entry and surrogate, compiled for every architecture without a GPU."""

from __future__ import annotations

import re

import pytest

from fastgrpo_kernels.runtime import LAUNCHES, Launch, launch_for
from tests.kernels.compile.compile_budget import PAIRS, complaints
from tests.kernels.compile.compiling import (
    CASES,
    PARTS,
    SIZES_OF_ONE,
    VARIANTS,
    assembly,
    compile_case,
    compiled,
    usage,
    with_sizes_of_one,
)


@pytest.mark.parametrize(("name", "part"), PAIRS)
def test_stays_within_the_limits(name, part):
    """Shared memory, spills, matrix units, TMA, fp64, atomics."""
    assert not complaints(name, part, usage(compiled(name, part)))


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


@pytest.mark.parametrize("part", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", SIZES_OF_ONE)
def test_sizes_of_one_compile(name, part):
    """A constant has no `.to`: V = 1 did not compile."""
    case = with_sizes_of_one(name)
    assert 1 in case.arguments
    if part in case.parts:
        launch = launch_for(case.launch, case.bits, PARTS[part].arch)
        assert assembly(compile_case(case, launch, PARTS[part]))


def test_a_spill_would_be_seen():
    """The limits can be missed: half of the warps do not hold the tile."""
    blocks = LAUNCHES["linear_logps"][16, "sm_90"].blocks
    cramped = Launch(blocks, num_warps=4, num_stages=3)
    used = usage(compile_case(VARIANTS["linear-bf16-plain"], cramped, PARTS["sm_90"]))
    assert used.stack > 0
    assert complaints("linear-bf16-plain", "sm_90", used) == [
        f"{used.stack} bytes of registers spilled"
    ]


def test_whatever_none_may_do_would_be_seen():
    used = usage(compiled("anchored_small_h", "sm_90"))
    bad = used._replace(shared=1 << 20, stack=8, matrix="", tma="store", specialised=False)
    bad = bad._replace(fp64=1, atomics=2)
    assert len(complaints("anchored_small_h", "sm_90", bad)) == 7


def test_every_launch_entry_is_compiled():
    reached = {
        (case.launch, id(launch_for(case.launch, case.bits, PARTS[part].arch)))
        for case in CASES.values()
        for part in case.parts
    }
    for kernel, entries in LAUNCHES.items():
        for (_, arch), launch in entries.items():
            assert arch == "interpreter" or (kernel, id(launch)) in reached, (kernel, arch)
