"""The code block of the README runs as printed, and its counts are right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, Qwen2Config

from fastgrpo import LossConfig, reference
from fastgrpo.objective.presets import PRESETS
from fastgrpo.testing import relative_error

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
(LINES,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TINY = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
CONFIGS = {"Qwen2": Qwen2Config(**TINY), "Granite": GraniteConfig(**TINY, logits_scaling=3.0)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_ten_lines_on_a_batch_that_is_padded_left(config, capsys):
    """Loss and gradients of all parameters, against the model's own logits and plain autograd."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    prompts, completions, prompt_length = (
        torch.tensor([5, 2] * 8),
        torch.tensor([4, 1, 3, 4] * 4),
        5,
    )
    place = torch.arange(prompt_length + 4)
    attention_mask = (place >= prompt_length - prompts[:, None]).long()
    attention_mask *= place < prompt_length + completions[:, None]
    input_ids = torch.randint(61, attention_mask.shape)
    completion_mask = attention_mask.bool() & (place >= prompt_length)
    rewards, old_logps = torch.randn(16), -4 * torch.rand(input_ids.shape)
    scope = dict(locals())
    exec(LINES, scope)
    assert len(capsys.readouterr().out.split()) == 2, "it printed two metrics"
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids, attention_mask=attention_mask, position_ids=positions).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    group = rewards.view(2, 8)
    advantages = (group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)
    loss = reference.policy_loss(
        logps, None, completion_mask[:, 1:], advantages.flatten(), LossConfig.preset("dapo"),
        old_logps=old_logps[:, 1:],
    )  # fmt: skip
    loss.backward()
    assert scope["out"].loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert relative_error(actual[name], p.grad) <= 1e-4, name


def test_the_number_of_presets():
    assert f"{len(PRESETS)} presets" in README
