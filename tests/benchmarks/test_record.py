"""The record has what the tables need, and the README shows the newest one."""

import json
import os
import time
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import environment, record, tables
from benchmarks.cases import BOUND
from benchmarks.conditions import CONDITIONS, beside_a_busy_process, one_thread
from benchmarks.environment import slug
from benchmarks.measure import Errors
from benchmarks.shapes import Shape
from benchmarks.stages import NO_TIME, Record, Stage
from benchmarks.time_model import targets

SHAPE = Shape("test", 64, 1031, 128)
NAMES = ("plain logits", "fastgrpo torch", "fastgrpo sparse")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A record of one tiny shape, without the memory stages."""
    path = tmp_path_factory.mktemp("results") / "cpu.json"
    patch = pytest.MonkeyPatch()
    patch.setattr(record, "TINY_SHAPES", (SHAPE,))
    patch.setattr(record, "CPU_PROVIDERS", NAMES)
    patch.setattr(record.cases, "memory", _peak_of_one_mib)
    patch.setattr(torch.cuda, "is_available", lambda: False)
    record.main(["--quick", "--budget", "100", "--output", str(path)])
    patch.undo()
    return path


def _peak_of_one_mib(who, shape, dtype, mode, *, timeout):
    row = {"shape": shape._asdict(), "dtype": str(dtype)[6:], "mode": mode, "peak_mib": 1.0}
    return [{"provider": provider.name, **row} for provider in who]


def test_record_schema(made):
    content = json.loads(made.read_text())
    assert {"device", "date", "commit", "versions", "threads", "gpu", "command"} <= set(content)
    assert content["date"].endswith("+00:00") and content["versions"]["torch"]
    assert content["skipped"] == {} and content["missing"] == {}
    assert content["sweep"] == []  # kernels are timed on GPUs
    for section in ("accuracy", "speed", "memory"):
        assert {row["dtype"] for row in content[section]} == {"float32", "bfloat16"}
        assert all(Shape(**row["shape"]) == SHAPE for row in content[section])
    names = {row["provider"] for row in content["speed"]}
    assert names == {BOUND, *NAMES}
    found = {(row["condition"], row["provider"]) for row in content["conditions"]}
    assert found == {(condition, name) for condition in CONDITIONS for name in names}
    modes = {row["mode"] for row in content["speed"] if row["provider"] == "fastgrpo sparse"}
    assert {"loss", "half_masked", "skip_90", "policy", "policy_sharp", "policy_flat"} <= modes
    kept = {row["mode"]: row["kept"] for row in content["speed"] if "kept" in row}
    assert 1 < kept["policy_sharp"] < kept["policy"] < kept["policy_flat"] < SHAPE.vocab
    for row in content["speed"]:
        assert len(row["samples_ms"]) >= 1
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    for row in content["accuracy"]:
        assert set(row["errors"]) == set(Errors._fields)
        assert "failure" not in row
        is_estimate = row["provider"] == "fastgrpo sparse"
        assert (row["errors"]["dhidden_noise"] is not None) == is_estimate


def stage(label, work, needs=1):
    return Stage("speed", label, needs, work)


def run(made, *stages):
    for waiting in made.waiting(stages):
        made.run(waiting)
    return json.loads(made.path.read_text())


def no_time_for_this():
    pytest.fail("there was no time for this")


def test_record_skips_by_name_when_time_is_up(tmp_path):
    made = Record(tmp_path / "r.json", budget=0)
    content = run(made, stage("large", no_time_for_this))
    assert content["skipped"] == {"speed, large": NO_TIME} and content["stages"] == {}


def test_record_goes_on_after_a_failed_stage(tmp_path):
    def fails():
        raise RuntimeError("CUDA error: out of memory\nand a long explanation")

    made = Record(tmp_path / "r.json", budget=100)
    content = run(made, stage("first", fails), stage("second", lambda: [{"provider": "x"}]))
    assert content["skipped"] == {"speed, first": "RuntimeError: CUDA error: out of memory"}
    assert content["speed"] == [{"provider": "x"}]
    assert list(content["stages"]) == ["speed, first", "speed, second"]


def test_record_names_the_running_stage_and_those_it_has_not_reached(tmp_path):
    made, seen = Record(tmp_path / "r.json", budget=100), []

    def looks():
        seen.append(json.loads(made.path.read_text()))
        return [{"provider": "x"}]

    content = run(made, stage("first", looks), stage("second", looks))
    assert [now["running"] for now in seen] == ["speed, first", "speed, second"]
    assert [list(now["skipped"]) for now in seen] == [
        ["speed, first", "speed, second"],
        ["speed, second"],
    ]
    assert content["running"] is None and content["skipped"] == {}


def test_a_record_has_its_warnings(tmp_path):
    def warns():
        warnings.warn("the portable kernels run", RuntimeWarning, stacklevel=1)
        return []

    content = run(Record(tmp_path / "r.json", budget=100), *(stage(x, warns) for x in "ab"))
    assert content["warnings"] == {"the portable kernels run": "speed, a"}


def test_a_record_is_gone_on_with(tmp_path):
    """What has ended is not done again, and what was not reached is done."""
    path, done = tmp_path / "r.json", []

    def fails():
        raise RuntimeError("once")

    stages = [
        stage("right", lambda: [{"provider": done.append(1)}]),
        stage("wrong", fails),
        stage("late", lambda: [{"provider": "late"}], needs=50),
    ]
    first = run(Record(path, budget=20), *stages)
    assert first["skipped"] == {"speed, wrong": "RuntimeError: once", "speed, late": NO_TIME}
    second = run(Record(path, budget=100), *stages)
    assert second["skipped"] == {"speed, wrong": "RuntimeError: once"} and done == [1]
    assert second["speed"] == [{"provider": None}, {"provider": "late"}]
    assert second["date"] == first["date"]


def test_a_record_of_another_commit_is_not_gone_on_with(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    monkeypatch.setattr(environment, "commit", lambda: "1234")
    Record(path, budget=1).write()
    # A record is among the changes of the tree that it is written in.
    monkeypatch.setattr(environment, "commit", lambda: "1234+changes")
    Record(path, budget=1)
    monkeypatch.setattr(environment, "commit", lambda: "5678")
    with pytest.raises(ValueError, match="r.json: expected a record of .* at 5678, got .* at 1234"):
        Record(path, budget=1)


@pytest.mark.parametrize("content", ["{}", "[]", '{"device": "cpu"}', "no JSON", ""])
def test_a_file_that_is_no_record_is_left_as_it_is(content, tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        record.main(["--output", str(path)])
    assert "--output: r.json: expected a record, " in capsys.readouterr().err
    assert path.read_text() == content


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages", "checks", "--output", "r.json"], "--stages: expected a GPU"),
        (["--rehearse", "--output", "r.json"], "--rehearse: expected TRITON_INTERPRET=1"),
    ],
)
def test_options_without_effect_are_errors(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(record, "Record", None)  # nothing is measured
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        record.main(arguments)
    assert message in capsys.readouterr().err


def test_halves_need_a_file_that_holds_both(monkeypatch, capsys):
    monkeypatch.setattr(record, "Record", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        record.main(["--stages", "checks"])
    assert "--output: expected" in capsys.readouterr().err


def test_newest_record_of_each_kind(tmp_path):
    for name, date, gpu in (
        ("a", "2026-01-02T00:00:00+00:00", None),
        ("b", "2026-01-01T00:00:00+00:00", None),
        ("c", "2026-01-03T00:00:00+00:00", {"name": "H200"}),
    ):
        content = {"date": date, "gpu": gpu, "speed": [{"median_ms": 1.0}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    # The checks of a GPU session, without its measurements.
    checks = {"date": "2026-01-04", "gpu": {"name": "H200"}, "speed": []}
    (tmp_path / "checks.json").write_text(json.dumps(checks))
    (tmp_path / "profile.json").write_text(json.dumps({"date": "2026-02-01", "gpu": None}))
    assert tables.newest("cpu", tmp_path).name == "a.json"
    assert tables.newest("cuda", tmp_path).name == "c.json"


def test_tables_are_filled_between_their_markers(made):
    text = "before\n<!-- table:cpu -->\nold\n<!-- /table -->\nbetween\n"
    text += "<!-- table:accuracy --><!-- /table -->\nafter\n"
    filled = tables.fill(text, made.parent)
    assert filled.startswith("before\n") and filled.endswith("after\n") and "old" not in filled
    assert filled.count(f"benchmarks/results/{made.name}") == 2
    assert "| 64 x 1031 x 128 fp32 | fastgrpo torch |" in filled
    assert tables.fill(filled, made.parent) == filled


def test_rows_of_a_replaced_profile_are_left_out(made, tmp_path):
    text, content = "<!-- table:modes-cpu --><!-- /table -->", json.loads(made.read_text())
    for row in content["speed"]:
        if row["mode"] == "policy_flat":
            row["profile"] = "profile-of-another-model.json, temperature 1"
    (tmp_path / "cpu.json").write_text(json.dumps(content))
    filled = tables.fill(text, tmp_path)
    assert "| policy_flat |" in tables.fill(text, made.parent)
    assert "| policy_flat |" not in filled and "| policy |" in filled


def test_table_without_a_record_says_so(tmp_path):
    filled = tables.fill("<!-- table:cuda -->\n1.0x\n<!-- /table -->", tmp_path)
    assert filled == "<!-- table:cuda -->\nNo record yet.\n<!-- /table -->"


def test_unknown_table_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="gpus"):
        tables.fill("<!-- table:gpus --><!-- /table -->", tmp_path)


@pytest.mark.parametrize(
    "path, folder",
    tables.DOCUMENTS.items(),
    ids=[path.stem for path in tables.DOCUMENTS],
)
def test_documents_show_the_newest_records(path, folder):
    text = path.read_text()
    assert tables.fill(text, folder=folder) == text, "run python -m benchmarks.tables"


def test_targets_are_held_against_a_record():
    assert targets.table({"speed": []}).count("not measured") == len(targets.TARGETS)
    size = {"rows": 8192, "vocab": 151936, "hidden": 4096}

    def row(provider, mode, ms, share=0.0):
        timed = {"median_ms": ms, "share_of_bound": share, "peak_mib": 5000.0}
        return {"provider": provider, "mode": mode, "shape": size, **timed}

    speed = [
        row("fastgrpo triton", "loss", 42.0, 0.95),
        row("fastgrpo triton", "half_masked", 25.2),
        row("TRL chunked", "loss", 63.0),
        row(BOUND, "policy", 40.0),
        row("fastgrpo sparse", "policy", 16.0),
    ]
    text = targets.table({"speed": speed})
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert "| 0.95 | met |" in lines["fused loss, share of 6NVH, H >= 2560"]
    assert "not measured" in lines["fused loss, share of 6NVH, H = 1024"]
    assert "| 0.6 | missed |" in lines["half of the rows masked, of the dense time"]
    assert "| 1.5 | met |" in lines["times TRL 1.16"]
    assert "| 1.2 | met |" in lines["sparse at tau = 1e-3, a policy's rows, of 2NVH"]
    assert "| 42 | met |" in lines["8192 x 151936 x 4096, ms"]
    assert "| 5.24 | met |" in lines["8192 x 151936 x 4096, GB"]


def test_slug_is_a_file_name():
    assert slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


def test_a_condition_holds_only_within_it():
    threads, before = torch.get_num_threads(), _children()
    with one_thread():
        assert torch.get_num_threads() == 1
    with beside_a_busy_process():
        (busy,) = _children() - before
        used = _cpu_ticks(busy)
        deadline = time.monotonic() + 60
        while _cpu_ticks(busy) < used + 20 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _cpu_ticks(busy) >= used + 20
    assert torch.get_num_threads() == threads and _children() == before


def _children() -> set[str]:
    task = Path(f"/proc/self/task/{os.getpid()}/children")
    return set(task.read_text().split())


def _cpu_ticks(process: str) -> int:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11])
