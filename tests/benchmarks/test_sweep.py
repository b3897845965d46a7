"""The sweep puts each launch into the table, times it, and restores the table."""

from unittest import mock

import pytest
import torch

from benchmarks.shapes import Shape
from benchmarks.time_model import sweep
from fastgrpo_kernels import runtime

SHAPE = Shape("test", 32, 101, 16)
KEY = (16, "sm_90")


def launches_used(monkeypatch, result):
    """Run a sweep of a kernel that computes `result(launch)`; return its rows and its launches."""
    used = []

    def call(hidden, weight, ids):
        used.append(runtime.launch_for("linear_logps", *KEY))
        return result(used[-1])

    variants = sweep.CANDIDATES["linear_logps"][1]
    monkeypatch.setitem(sweep.CANDIDATES, "linear_logps", (call, variants))
    monkeypatch.setattr(runtime, "architecture", lambda device: KEY[1])
    rows = sweep.sweep_launches(
        "linear_logps", SHAPE, torch.bfloat16, torch.device("cpu"), seconds=5
    )
    return rows, used


def test_every_candidate_is_launched_and_timed(monkeypatch):
    before = dict(runtime.LAUNCHES["linear_logps"])
    rows, used = launches_used(monkeypatch, lambda launch: torch.zeros(3))
    assert runtime.LAUNCHES["linear_logps"] == before
    names = [row["name"] for row in rows]
    assert names[0] == sweep.TABLE and len(set(names)) == len(names) > 5
    assert {row["launch"]["BLOCK_V"] for row in rows} >= {128, 256}
    assert all(row["median_ms"] >= 0 and row["share_of_bound"] > 0 for row in rows)
    assert all(launch in used for launch in sweep.CANDIDATES["linear_logps"][1])


@pytest.mark.parametrize("kernel", sweep.CANDIDATES)
def test_the_launcher_is_called_as_it_is_declared(kernel, monkeypatch):
    name = "linear_logps_fwd" if kernel == "linear_logps" else "anchored_logps_fwd"
    launcher = mock.create_autospec(getattr(sweep, name))
    monkeypatch.setattr(sweep, name, launcher)
    hidden, weight, ids = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)
    sweep.CANDIDATES[kernel][0](hidden, weight, ids)
    (rows, head, with_entropy), _ = launcher.call_args
    assert rows.hidden is hidden and rows.ids is ids and head.weight is weight
    assert with_entropy is False


def test_wrong_and_failing_launches_are_named(monkeypatch):
    def result(launch):
        if launch.num_warps == 4:
            raise RuntimeError("out of resource: shared memory")
        return torch.full((3,), 0.1 if launch.blocks["BLOCK_N"] == 256 else 0.0)

    rows, _ = launches_used(monkeypatch, result)
    for row in rows:
        failure = row.get("failure", "")
        assert ("shared memory" in failure) == (row["launch"]["num_warps"] == 4)
        assert ("nats" in failure) == (row["launch"]["BLOCK_N"] == 256)
        assert ("median_ms" in row) == (failure == "")


def test_table_is_restored_after_an_error(monkeypatch):
    before = dict(runtime.LAUNCHES["linear_logps"])
    for key in (KEY, (16, "new")):
        with pytest.raises(RuntimeError), sweep._entry("linear_logps", key, runtime.Launch()):
            raise RuntimeError
    assert runtime.LAUNCHES["linear_logps"] == before


def test_kernels_are_swept_where_they_run():
    narrow, wide = (Shape("test", 32, 101, h) for h in (1024, 3584))

    def swept(shape, arch):
        return {kernel for kernel in sweep.CANDIDATES if sweep.has_table(kernel, shape, 16, arch)}

    assert swept(narrow, "sm_90") == {"linear_logps", "anchored_logps_small_h"}
    assert swept(wide, "sm_90") == {"linear_logps", "anchored_logps"}
    assert swept(narrow, "sm_100") == swept(wide, "sm_100") == {"linear_logps", "anchored_logps"}
    assert swept(wide, "sm_86") == {"linear_logps"}
