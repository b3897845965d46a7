"""The committed runs under top-p: the support makes the ratio to the sampler 1, and both learn."""

from __future__ import annotations

import pytest

from benchmarks import ratio_to_sampler
from benchmarks.learning import KEPT, kept_run


@pytest.mark.parametrize("name", ratio_to_sampler.SAMPLERS)
def test_a_run_is_whole_and_learns(name) -> None:
    result, steps, facts = kept_run(name, ratio_to_sampler.RUNS)
    assert [row["step"] for row in steps] == list(range(1, result["steps"] + 1))
    settings = ratio_to_sampler.SETTINGS
    assert {key: result["config"][key] for key in settings} == settings
    assert result["steps"] == settings["max_steps"] and not result["interrupted"]
    assert "+changes" not in facts["commit"]
    for file in (*KEPT, "run.json"):
        assert "/tmp" not in (ratio_to_sampler.RUNS / name / file).read_text()
    assert result["accuracy_after"] > 0.9 > 0.5 > result["accuracy_before"]


def test_the_log_ratio_is_rounding_with_the_support_alone() -> None:
    runs = {name: kept_run(name, ratio_to_sampler.RUNS)[1] for name in ratio_to_sampler.SAMPLERS}
    assert max(row["sampler_gap_max"] for row in runs["support"]) <= 1e-4
    without = [row["sampler_gap_mean"] for row in runs["whole-vocabulary"]]
    assert sum(without) / len(without) > 1e-2


def test_the_figure_is_drawn_from_the_runs(tmp_path) -> None:
    ratio_to_sampler.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
