"""The record has what the tables need, and the README shows the newest one."""

import json

import pytest

from benchmarks import record, tables
from benchmarks.cases import BOUND
from benchmarks.environment import slug
from benchmarks.measure import MODES, Errors
from benchmarks.providers import load
from benchmarks.shapes import LARGE_SHAPE, Shape
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
    patch.setattr(record.torch.cuda, "is_available", lambda: False)
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


def test_record_skips_by_name_when_time_is_up(tmp_path):
    made = record.Record(tmp_path / "r.json", budget=0)
    made.stage("speed", "large", 10, lambda: pytest.fail("there was no time for this"))
    assert json.loads(made.path.read_text())["skipped"] == {"speed, large": "no time left"}


def test_record_goes_on_after_a_failed_stage(tmp_path):
    made = record.Record(tmp_path / "r.json", budget=100)

    def fails():
        raise RuntimeError("CUDA error: out of memory\nand a long explanation")

    made.stage("speed", "first", 1, fails)
    made.stage("speed", "second", 1, lambda: [{"provider": "x"}])
    content = json.loads(made.path.read_text())
    assert content["skipped"] == {"speed, first": "RuntimeError: CUDA error: out of memory"}
    assert content["speed"] == [{"provider": "x"}]


def test_cuda_stages_cover_every_head_and_mode(tmp_path):
    made = record.Record(tmp_path / "r.json", budget=540)
    available, _ = load(("plain logits", "fastgrpo torch"))
    stages = record.cuda_stages(available, made, quick=False)
    labels = [stage[1] for stage in stages]
    assert len(stages) == len({stage[:2] for stage in stages}) and labels[0] == "gpu tests"
    for head in ("qwen3-0.6b", "qwen2.5-7b", "llama-3-8b", "gemma-3-4b"):
        for rows in (4096, 16384, 65536):
            assert any(label.startswith(f"{head} N={rows} ") for label in labels)
    for mode in MODES:
        assert any(label.endswith(f" {mode}") for label in labels)
    for section in record.SECTIONS[:3]:
        assert any(stage[0] == section for stage in stages)
    assert any(label == f"{LARGE_SHAPE.label} loss" for label in labels)


@pytest.mark.parametrize("finishes", [True, False])
def test_gpu_tests_leave_what_they_have_shown(tmp_path, finishes):
    """A run that is cut off has its output and its counts in the record and beside it."""
    module = tmp_path / "test_it.py"
    module.write_text(
        "import time\n"
        "def test_first(): pass\n"
        "def test_second(): assert False\n"
        f"def test_third(): time.sleep({0 if finishes else 60})\n"
    )
    log = tmp_path / "record.tests.log"
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = (str(module), "-c", str(tmp_path / "pytest.ini"))
    (row,) = record.gpu_tests(log, timeout=60 if finishes else 8, options=options)
    assert row["counts"] == {"PASSED": 1 + finishes, "FAILED": 1, "ERROR": 0}
    assert "test_second FAILED" in log.read_text() and row["tail"]
    if finishes:
        assert row["exit_code"] == 1
    else:
        assert row["failure"] == "did not finish in 8 s"


def test_newest_record_of_each_kind(tmp_path):
    for name, date, gpu in (
        ("a", "2026-01-02T00:00:00+00:00", None),
        ("b", "2026-01-01T00:00:00+00:00", None),
        ("c", "2026-01-03T00:00:00+00:00", {"name": "H200"}),
    ):
        content = {"date": date, "gpu": gpu, "speed": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "workload.json").write_text(json.dumps({"date": "2026-02-01", "gpu": None}))
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
