"""The race against TRL, rehearsed: both sides learn the same from the same completions."""

from __future__ import annotations

import json

import pytest

from benchmarks import train_step
from benchmarks.train_step_case import FULL


def test_the_case_is_the_committed_one() -> None:
    assert len(FULL.prompts) == 4 and FULL.group == 8
    assert sum(FULL.prompts) / 4 == 150 and round(sum(FULL.lengths) / 32) == 50
    assert FULL.lengths.count(128) == 4 == 32 // 8 and max(FULL.lengths) == 128
    half, every = FULL.rewards("half"), FULL.rewards("all")
    groups = [slice(i * 8, i * 8 + 8) for i in range(4)]
    assert [len(set(half[g])) for g in groups] == [2, 1, 2, 1]
    assert [len(set(every[g])) for g in groups] == [2] * 4


def test_both_sides_take_the_same_step(tmp_path, capsys) -> None:
    pytest.importorskip("trl")
    output = tmp_path / "record.json"
    sizes = ["--rounds", "1", "--trl-batch", "2", "--budget", "20"]
    train_step.main(["--rehearse", *sizes, "--output", str(output)])
    record = json.loads(output.read_text())
    for samples in record["samples"].values():
        for command, asked in samples["ours"].items():
            for ours, trl in zip(asked, samples["trl"].get(command, []), strict=False):
                if command.startswith("step"):
                    continue
                assert ours["loss"] == pytest.approx(trl["loss"], rel=1e-4, abs=1e-7)
                assert ours["grad_norm"] == pytest.approx(trl["grad_norm"], rel=1e-4)
                assert ours["grad_norm"] > 0
    kept = record["samples"]["kept"]
    assert {len(kept[side]["step half"]) for side in ("ours", "trl")} == {1}
    assert kept["ours"]["evaluate"][0]["sampling"] > 0
    assert str(tmp_path) not in output.read_text()
    assert "| update, every group alive, gradient checkpointing |" in capsys.readouterr().out
