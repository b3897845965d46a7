"""The compiled anchored kernel has what should make it fast: TMA, no spills, one main loop."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest

from fastgrpo_kernels.runtime import LAUNCHES
from tests.kernels.compile.compiling import (
    CASES,
    PARTS,
    VARIANTS,
    assembly,
    compile_case,
    compiled,
    tool,
    usage,
)

FLATTENED = LAUNCHES["anchored_logps"][16, "sm_90"]
SPECIALISED = LAUNCHES["anchored_logps_small_h"][16, "sm_90"]
MODES = [name for name in (*CASES, *VARIANTS) if re.match("anchored($|-)", name)]


def test_every_mode_is_here():
    assert {"anchored", "anchored-options", "anchored-fp16"} < set(MODES)
    for what in ("exps", "draw"):
        assert len([mode for mode in MODES if what in mode]) == 2  # with options and without


@pytest.mark.parametrize("part", ["sm_90", "sm_100"])
@pytest.mark.parametrize("mode", MODES)
def test_tiles_come_by_tma_and_nothing_spills(mode, part):
    used = usage(compiled(mode, part))
    assert used.stack == 0 and used.shared <= PARTS[part].shared_limit
    assert used.tma.split() == ["load", "store"][: 1 + ("exps" in mode)]
    assert PARTS[part].matrix_instruction in used.matrix
    assert used.atomics == used.fp64 == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", itertools.product([False, True], repeat=4), ids=str)
@pytest.mark.parametrize("mode", ["anchored", "anchored-exps-plain"])
def test_no_choice_of_options_spills(mode, options):
    """But for a few registers of a softcap's division, now and then, once per tile.

    Temperatures are as the launcher passes them.
    """
    bias, softcap, with_entropy, ragged = options
    case = (CASES | VARIANTS)[mode]
    arguments = dict(zip(case.kernel.arg_names, case.arguments, strict=False))
    arguments["bias_ptr"] = "*bf16/16" if bias else None
    arguments |= {"SOFTCAP": softcap, "WITH_ENTROPY": with_entropy, "RAGGED_V": ragged}
    case = case._replace(arguments=list(arguments.values()))
    assert usage(compile_case(case, FLATTENED, PARTS["sm_90"])).stack <= 32 * softcap


# ---- warp specialisation -----------------------------------------------------------------------


def engages(launch):
    kernel = compile_case(CASES["anchored_small_h"], launch, PARTS["sm_90"])
    return "ttg.warp_specialize" in kernel.asm["ttgir"]


@pytest.mark.parametrize("name", ["anchored_small_h", "anchored_small_h-options"])
def test_warps_are_specialised_where_the_table_says_so(name):
    """A producer and two consumer groups, with registers given from one to the others."""
    kernel = compiled(name, "sm_90")
    assert usage(kernel).specialised and usage(kernel).stack == 0
    assert kernel.metadata.num_warps == 12
    assert "setmaxnreg" in assembly(kernel)
    assert not usage(compiled("anchored", "sm_90")).specialised


@pytest.mark.parametrize(
    "change",
    [{"num_warps": 8}, {"blocks": SPECIALISED.blocks | {"FLATTEN": True}}],
    ids=["8 warps", "flattened"],
)
def test_the_compiler_ignores_other_wishes_in_silence(change):
    assert engages(SPECIALISED) and not engages(replace(SPECIALISED, **change))


# ---- what runs in the inner loop ---------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_epilogue_stays_out_of_the_main_loop(mode):
    """Flattening merges the loops; what belongs to whole tiles must hide behind a branch.

    A step starts its products, waits for those before, starts the loads of a later step, and then
    goes on or falls through into the epilogue.
    """
    listing = tool("nvdisasm", "-c", kernel=compiled(mode, "sm_90"))
    line = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_]+)"
    code = re.findall(line, listing, re.MULTILINE)
    first = code.index("HGMMA")
    step = code[first : code.index("BRA", first)]
    assert step.count("HGMMA") == 4 and step.count("UTMALDG") == 2
    assert not {"MUFU", "FSEL", "FFMA", "FADD", "STG", "STL", "LDL"} & set(step)
    assert len(step) < 80
    assert code.count("HGMMA") == 4, "one main loop, without copies for a first or last step"
