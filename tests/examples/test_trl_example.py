"""examples/trl_grpo.py: it runs, takes TRL's flags, and learns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")

from transformers import HfArgumentParser  # noqa: E402

from fastgrpo.integrations.trl import chunked_head, fused_loss  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "examples" / "trl_grpo.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def run(script: ModuleType, folder: Path, *flags: str) -> tuple[float, float]:
    given = ["--output_dir", str(folder), "--disable_tqdm", "True", *flags]
    (settings,) = HfArgumentParser(script.Settings).parse_args_into_dataclasses(given)
    return script.main(settings)


def test_a_few_steps_with_flags_of_trl(script, tmp_path, monkeypatch, capsys):
    losses, original = [], fused_loss.grpo_loss

    def spy(*args, **kwargs):
        losses.append(kwargs["config"].aggregation)
        return original(*args, **kwargs)

    monkeypatch.setattr(fused_loss, "grpo_loss", spy)
    monkeypatch.setattr(chunked_head, "say_once", pytest.fail)
    before, after = run(
        script, tmp_path, "--imitation_steps", "60", "--max_steps", "3", "--loss_type", "grpo",
        "--per_device_train_batch_size", "32", "--logging_steps", "1",
    )  # fmt: skip
    assert losses == ["sequence_mean"] * 3
    assert 0 <= before < 1 and after != before
    assert capsys.readouterr().out.count("'clip_ratio/region_mean'") == 3


@pytest.mark.slow
def test_it_learns_to_add(script, tmp_path):
    before, after = run(script, tmp_path)
    assert before < 0.5 and after > 0.95
