"""Compiled kernels agree with the committed table, so that a regression is a diff to approve."""

from __future__ import annotations

import json

import pytest
import triton

from tests.kernels.compile.compile_budget import COMMAND, TABLE, differences, measure


def test_the_table_is_what_the_compiler_gives():
    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is triton {table['triton']}'s, this is {triton.__version__}")
    changed = differences(table, measure())
    assert not changed, "\n".join(["", *changed, f"If that is meant: {COMMAND}"])


def test_a_difference_is_one_line():
    def table(**kernels):
        return {"triton": "1", "kernels": kernels}

    old = table(a={"registers": 8, "shared": 4}, b={"registers": 1}, c={"registers": 1})
    new = table(a={"registers": 9, "stack": 4}, b={"registers": 1}, d={"registers": 1})
    changes = "registers 8 -> 9, stack 0 -> 4, shared 4 -> 0"
    assert differences(old, new) == [f"a: {changes}", "c: gone", "d: new"]
    assert differences(new, new) == []
