"""examples/custom_task.py: what it asks, where it writes, and that it is learnt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastgrpo.train.config import TrainConfig
from fastgrpo.train.scoring import right, score

ROOT = Path(__file__).parents[2]


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import custom_task

    return custom_task


def result_in(folder: Path) -> dict:
    (run,) = (folder / "runs").glob("largest-digit-seed0-*")
    return json.loads((run / "result.json").read_text())


def test_the_largest_digit_is_right(example) -> None:
    task = example.largest_digit(held_out=100)
    assert len(task.train) == 800 and len(task.held_out) == 100
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.held_out}
    (known,) = (e for e in task.train + task.held_out if e.prompt == "375=")
    given = (task, [known] * 3, ["7", "5", "77"])
    assert right(*given) == [True, False, False]
    assert score(*given).rewards.tolist() == [1.0, 0.0, 0.0]


def test_the_run_folder_has_the_tasks_name(example, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(
        device="cpu", backend="torch", warmup_steps=0, beta=0.0, max_completion_length=2,
        num_prompts=2, max_steps=1,
    )  # fmt: skip
    assert example.main(config, example.largest_digit(held_out=4)) == 0
    assert result_in(tmp_path)["task"] == "largest-digit"


@pytest.mark.slow
def test_a_tiny_model_learns_it(tmp_path) -> None:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    script = [sys.executable, str(ROOT / "examples" / "custom_task.py")]
    subprocess.run(script, cwd=tmp_path, env=environment, check=True, capture_output=True)
    result = result_in(tmp_path)
    assert result["accuracy_before"] < 0.2 and result["accuracy_after"] > 0.9
