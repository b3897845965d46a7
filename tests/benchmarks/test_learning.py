"""The committed runs of the loop: what they left agrees, and is what the documents show."""

from __future__ import annotations

import pytest

from benchmarks import learning

MADE = [name for name in learning.COMMITTED if (learning.RUNS / name).exists()]


@pytest.mark.parametrize("name", MADE)
def test_a_run_is_whole_and_names_no_folder_of_a_machine(name) -> None:
    result, steps, facts = learning.kept_run(name)
    assert [row["step"] for row in steps] == list(range(1, result["steps"] + 1))
    assert result["config"]["task"] == learning.COMMITTED[name].task
    assert not result["interrupted"]
    assert "+changes" not in facts["commit"]
    for file in (*learning.KEPT, "run.json"):
        assert "/tmp" not in (learning.RUNS / name / file).read_text()


def test_a_curve_goes_from_before_to_after() -> None:
    result = {"accuracy_before": 0.5, "accuracy_after": 0.9, "steps": 25}
    steps = [{"step": n, "reward": 0.0} for n in range(1, 26)]
    steps[9]["accuracy"], steps[19]["accuracy"] = 0.6, 0.7
    assert learning.curve(result, steps) == {0: 0.5, 10: 0.6, 20: 0.7, 25: 0.9}


def test_every_seed_learns_sums_and_the_control_does_not() -> None:
    for name in ("sums-seed0", "sums-seed1", "sums-seed2"):
        result, _, _ = learning.kept_run(name)
        assert result["accuracy_before"] < 0.5 and result["accuracy_after"] > 0.9
    result, _, _ = learning.kept_run("sums-control")
    assert result["accuracy_after"] == result["accuracy_before"]


def test_the_figure_is_drawn_from_the_runs(tmp_path) -> None:
    learning.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_fails_is_an_error_and_keeps_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(learning, "RUNS", tmp_path / "runs")
    with pytest.raises(RuntimeError, match="sums-seed0: exit code 2"):
        learning.train("sums-seed0", tmp_path / "no" / "model", None, {})
    assert not (tmp_path / "runs").exists()
