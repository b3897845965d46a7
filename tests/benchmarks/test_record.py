"""The record has what the tables need, and the README shows the newest one."""

import json

import pytest

from benchmarks import record, tables
from benchmarks.cases import BOUND
from benchmarks.environment import slug
from benchmarks.providers import load
from benchmarks.shapes import Shape

SHAPE = Shape("test", 32, 101, 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A record of one tiny shape, without the memory stages."""
    path = tmp_path_factory.mktemp("results") / "cpu.json"
    patch = pytest.MonkeyPatch()
    patch.setattr(record, "TINY_SHAPES", (SHAPE,))
    patch.setattr(record, "CPU_PROVIDERS", ("plain logits", "fastgrpo torch"))
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
    for section in record.SECTIONS:
        assert {row["dtype"] for row in content[section]} == {"float32", "bfloat16"}
        for row in content[section]:
            assert Shape(**row["shape"]) == SHAPE and row["mode"] == "loss"
    names = {row["provider"] for row in content["speed"]}
    assert names == {BOUND, "plain logits", "fastgrpo torch"}
    for row in content["speed"]:
        assert len(row["samples_ms"]) >= 1
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    for row in content["accuracy"]:
        assert set(row["errors"]) == {"logps_rms", "logps_max", "loss", "dhidden", "dweight"}
        assert "failure" not in row


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
    labels = [stage[1] for stage in record.cuda_stages(available, made, quick=False)]
    assert len(labels) == len(set(labels)) and labels[0] == "gpu tests"
    for head in ("qwen3-0.6b", "qwen2.5-7b", "llama-3-8b", "gemma-3-4b"):
        for rows in (4096, 16384, 65536):
            assert any(label.startswith(f"{head} N={rows} ") for label in labels)
    for mode in ("logps", "loss", "token_logps", "frozen", "half_zero", "skip_90"):
        assert any(label.endswith(f" {mode}") for label in labels)


def test_newest_record_of_each_kind(tmp_path):
    for name, date, gpu in (
        ("a", "2026-01-02T00:00:00+00:00", None),
        ("b", "2026-01-01T00:00:00+00:00", None),
        ("c", "2026-01-03T00:00:00+00:00", {"name": "H200"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"date": date, "gpu": gpu}))
    assert tables.newest("cpu", tmp_path).name == "a.json"
    assert tables.newest("cuda", tmp_path).name == "c.json"


def test_tables_are_filled_between_their_markers(made):
    text = "before\n<!-- table:cpu -->\nold\n<!-- /table -->\nbetween\n"
    text += "<!-- table:accuracy --><!-- /table -->\nafter\n"
    filled = tables.fill(text, made.parent)
    assert filled.startswith("before\n") and filled.endswith("after\n") and "old" not in filled
    assert filled.count(f"benchmarks/results/{made.name}") == 2
    assert "| 32 x 101 x 16 fp32 | fastgrpo torch |" in filled
    assert tables.fill(filled, made.parent) == filled


def test_table_without_a_record_says_so(tmp_path):
    filled = tables.fill("<!-- table:cuda -->\n1.0x\n<!-- /table -->", tmp_path)
    assert filled == "<!-- table:cuda -->\nNo record yet.\n<!-- /table -->"


def test_unknown_table_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="gpus"):
        tables.fill("<!-- table:gpus --><!-- /table -->", tmp_path)


def test_readme_shows_the_newest_record():
    if not tables.README.exists():
        pytest.skip("no README")
    text = tables.README.read_text()
    assert tables.fill(text) == text, "run python -m benchmarks.tables"


def test_slug_is_a_file_name():
    assert slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"
