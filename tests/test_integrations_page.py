"""The blocks of docs/integrations.md run as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastgrpo
from model_families import VOCAB, tiny

PAGE = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
OURS = ["A loop of your own", "PEFT", "DDP", "FSDP2", "accelerate"]


@pytest.mark.parametrize("section", OURS)
def test_the_blocks_of_a_section(section, alone):
    if section in ("PEFT", "accelerate"):
        pytest.importorskip(section.lower())
    blocks = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    assert blocks
    g = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, VOCAB, (4, 9), generator=g)
    names = dict(
        model=tiny("qwen2"),
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        loss_mask=(torch.arange(9) > 3).expand(4, 9),
        old_logps=-4 + torch.randn(4, 9, generator=g),
        advantages=torch.randn(4, generator=g),
        count=20.0,
        normalizer=20.0,
        fastgrpo=fastgrpo,
        torch=torch,
    )
    for block in blocks:
        exec(block, names)
    model = names["lm"]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)


def test_every_section_is_run_somewhere():
    """TRL's by tests/integrations; what has no block by tests of its own."""
    elsewhere = {
        "TRL", "Triton's cache", "Autocast", "torch.compile, CUDA graphs and checkpointing",
    }  # fmt: skip
    assert set(SECTIONS) - set(OURS) <= elsewhere
