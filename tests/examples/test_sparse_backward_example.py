"""examples/sparse_backward.py: its files, and that its runs differ in sparsity alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "sparse_backward.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sparse_backward_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_quick_run_leaves_figure_data_and_table(script, tmp_path, capsys) -> None:
    script.main(["--output-dir", str(tmp_path), "--quick"])
    assert (tmp_path / "sparse-learning.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / "sparse-learning.json").read_text())["runs"]
    assert list(runs) == ["0", "0.1"]
    assert all(len(run["rewards"]) == 2 for run in runs.values())
    assert runs["0"]["kept_entries"] == 512 and 1 < runs["0.1"]["kept_entries"] < 20
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[1:3]] == ["0", "0.1"]


def test_runs_begin_alike_and_learn(script) -> None:
    settings = script.Settings(vocab=256, hidden=16, contexts=8, steps=60)
    torch.manual_seed(0)
    exact, sparse = (script.learn(settings, sparsity, 0)["rewards"] for sparsity in (0.0, 0.05))
    assert exact[0] == sparse[0] and exact != sparse
    for rewards in (exact, sparse):
        assert sum(rewards[-10:]) > sum(rewards[:10]) + 1
