"""The sweep puts each launch into the table, times it, and restores the table."""

from unittest import mock

import pytest
import torch

from benchmarks.shapes import Shape
from benchmarks.time_model import sweep
from fastgrpo_kernels import anchored_variant, runtime

SHAPE = Shape("test", 32, 101, 16)
KEY = (16, "sm_90")


def launches_used(monkeypatch, result, kernel="linear_logps"):
    """Run a sweep of a kernel that computes `result(launch)`; return its rows and its launches."""
    used = []

    def call(hidden, weight, ids):
        if kernel == "linear_logps":
            launch = runtime.launch_for(kernel, *KEY)
        else:
            launch = anchored_variant.anchored_launch(hidden, scores_only=True)
        used.append(launch)
        return result(launch)

    variants = sweep.CANDIDATES[kernel][1]
    monkeypatch.setitem(sweep.CANDIDATES, kernel, (call, variants))
    for module in (runtime, anchored_variant):
        monkeypatch.setattr(module, "architecture", lambda device: KEY[1])
    rows = sweep.sweep_launches(kernel, SHAPE, torch.bfloat16, torch.device("cpu"), seconds=5)
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


@pytest.mark.parametrize("asked_for", ["0", "1"])
@pytest.mark.parametrize("refused", ["", "its sums are wrong"])
def test_specialised_warps_are_timed_beside_the_default(monkeypatch, refused, asked_for):
    """Whatever the user has asked for; but not where their trial refuses them."""
    monkeypatch.setenv(anchored_variant.SWITCH, asked_for)
    monkeypatch.setattr(sweep, "refusal", lambda device: refused)
    before = {name: dict(table) for name, table in runtime.LAUNCHES.items()}
    rows, used = launches_used(monkeypatch, lambda launch: torch.zeros(3), sweep.SMALL_H)
    assert runtime.LAUNCHES == before
    default, specialised = before["anchored_logps"][KEY], before[sweep.SMALL_H][KEY]
    assert rows[0]["name"] == sweep.TABLE and rows[0]["launch"] == default.kwargs()
    assert specialised.kwargs() in [row["launch"] for row in rows]
    for row in rows:
        wrong = refused and row["launch"]["WARP_SPECIALIZE"]
        assert row.get("failure") == (f"RuntimeError: {refused}" if wrong else None)
    launched = [launch.kwargs() for launch in used]
    assert all((row["launch"] in launched) == ("failure" not in row) for row in rows)


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

    assert swept(narrow, "sm_90") == set(sweep.CANDIDATES)
    assert swept(wide, "sm_90") == {"linear_logps", "anchored_logps"}
    assert swept(narrow, "sm_100") == swept(wide, "sm_100") == {"linear_logps", "anchored_logps"}
    assert swept(wide, "sm_86") == {"linear_logps"}
