"""Every launcher through Triton's own JIT, on a driver in which nothing computes.

It shows launches that fail, not wrong numbers: those are the interpreter's to find.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil

import pytest
import torch

from fastgrpo_kernels.runtime import LAUNCHES
from tests.kernels.launch.cases import MANY
from tests.kernels.launch.planted import DESCRIPTORS, GRID, RESOURCES
from tests.kernels.launch.stand_in import PARTS, build, report_of, start

# Only the anchored path launches these, and not every part has it.
OF_ANCHORED = {"anchor_rows", "finish_anchored", "list_rows", "compact_mask"}


def require_compiler() -> None:
    if not shutil.which("gcc"):
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("the stand-in driver: no gcc to build it with")


def require_no_driver() -> None:
    if torch.version.hip or has_cuda_driver():
        pytest.skip("the stand-in driver: this machine has a driver of its own")


def has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


class Reports:
    """The processes that launch, one per part, side by side."""

    def __init__(self, folder, *families: str):
        require_no_driver()
        require_compiler()
        build(folder)
        self.folder = folder
        self.children = {part: start(folder, part, *families) for part in PARTS}

    def __getitem__(self, part: str) -> list[dict]:
        """The lines that the process of a part wrote, once it has ended."""
        status, text = self.children[part].wait(), report_of(self.folder, part).read_text()
        assert status == 0, text[-3000:]
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def stop(self) -> None:
        for child in self.children.values():
            child.kill()
            child.wait()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    reports = Reports(tmp_path_factory.mktemp("stand-in"), "usual", "planted")
    yield reports
    reports.stop()


def failures(lines: list[dict]) -> list[str]:
    """What did not launch, or took the settings of a launch and never reached the driver."""
    broken = [f"{x['case']}: {x['error']}" for x in lines if x["error"]]
    lost = [x["case"] for x in lines if not x["error"] and len(x["entries"]) != len(x["kernels"])]
    return broken + lost


def of_family(lines: list[dict], family: str) -> list[dict]:
    return [x for x in lines if x["family"] == family]


@pytest.mark.parametrize("part", PARTS)
def test_every_case_launches(reports, part):
    lines = of_family(reports[part], "usual")
    assert len(lines) > 50
    assert not failures(lines)


@pytest.mark.parametrize("part", PARTS)
def test_every_launch_entry_is_launched(reports, part):
    """A kernel or an entry without a case is one too few."""
    lines = of_family(reports[part], "usual")
    launched = {entry for x in lines if not x["error"] for entry in x["entries"]}
    has_anchored = (16, part) in LAUNCHES["anchored_logps"]
    wanted = {
        f"{kernel} {bits} {arch}"
        for kernel, table in LAUNCHES.items()
        for bits, arch in table
        if arch in (part, "any") and (has_anchored or kernel not in OF_ANCHORED)
    }
    assert launched == wanted


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_launched_for_nothing(reports, part):
    empty = {"n=0", "B=0", "E=0"}
    lines = [x for x in of_family(reports[part], "usual") if empty & {*x["case"].split()}]
    assert len(lines) > 5
    assert not [x["case"] for x in lines if x["kernels"]]


def test_row_09_more_rows_than_a_second_dimension_has(reports):
    """A grid is the same on every part."""
    lines = [x for x in of_family(reports["sm_90"], "usual") if f"={MANY}" in x["case"]]
    assert len(lines) >= 14
    assert not failures(lines)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_planted_is_refused(reports, part):
    """By the right rule; what an honest driver says before it runs anything is a LaunchError."""
    lines = of_family(reports[part], "planted")
    has_descriptors = (16, part) in LAUNCHES["anchored_logps"]
    expected = [GRID, RESOURCES, *(DESCRIPTORS if has_descriptors else ())]
    assert [x["case"] for x in lines] == expected
    assert not [x for x in lines if x["case"] not in x["error"]]
    assert all(x["error"].startswith("LaunchError: ") for x in lines if x["case"] != GRID)


@pytest.mark.slow
def test_every_mode_of_the_anchored_kernel(tmp_path):
    reports = Reports(tmp_path, "thorough")
    try:
        counts = {part: len(reports[part]) for part in PARTS}
        assert not [line for part in PARTS for line in failures(reports[part])]
    finally:
        reports.stop()
    assert counts["sm_90"] > counts["sm_100"] > counts["sm_80"] == 0


@pytest.mark.slow
def test_the_self_check_launches_and_sees_that_nothing_computes(tmp_path):
    reports = Reports(tmp_path, "self-check")
    try:
        lines = {part: reports[part] for part in PARTS}
    finally:
        reports.stop()
    assert not [line for part in PARTS for line in failures(lines[part])]
    assert [len(lines[part]) for part in ("sm_80", "sm_90", "sm_100")] == [3, 4, 4]


def test_no_compiler_is_a_skip_and_in_ci_a_failure(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception):
        require_compiler()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception):
        require_compiler()
