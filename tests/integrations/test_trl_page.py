"""docs/integrations.md: the blocks on TRL run, and train."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("trl", minversion="1.15")

from transformers import AutoModelForCausalLM  # noqa: E402
from trl import GRPOConfig  # noqa: E402
from trl.trainer import utils  # noqa: E402

from trl_runs import GRPO_SETTINGS, prompts, thirds  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
(SECTION,) = re.findall(r"^## TRL\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_trains(block, folder, tmp_path):
    before = utils._ChunkedLogProbFunction
    scope = {
        "model": str(folder),
        "reward": thirds,
        "args": GRPOConfig(output_dir=str(tmp_path), **{**GRPO_SETTINGS, "max_steps": 2}),
        "dataset": prompts(),
    }
    exec(block, scope)
    trainer = scope["trainer"]
    start = AutoModelForCausalLM.from_pretrained(folder)
    assert trainer.state.global_step == 2
    assert (trainer.model.lm_head.weight - start.lm_head.weight).abs().max() > 1e-3
    assert utils._ChunkedLogProbFunction is before
