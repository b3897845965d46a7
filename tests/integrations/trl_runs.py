"""A tiny model on disk, and runs of TRL's trainers on it that need no network and no GPU."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig

from fastgrpo.train.arithmetic import character_tokenizer

# Such values are of the machine, not of the loss.
TIMES = ("runtime", "per_second", "step_time", "total_flos")
OFFLINE = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "seed": 0,
    "model_init_kwargs": {"dtype": "float32"},
}
# At this learning rate ratios are clipped. With Adam's own epsilon a gradient that is rounding
# error alone would move its parameter as far as any other.
GRPO_SETTINGS = {
    **OFFLINE,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 12,
    "max_steps": 6,
    "learning_rate": 2e-2,
    "adam_epsilon": 1e-2,
    "temperature": 0.9,
}
LORA = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "up_proj"]}


def save_tiny_model(folder: Path, tied: bool = True) -> None:
    """Write a Qwen2 model and a tokenizer of 14 tokens: every second completion ends by itself."""
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, tie_word_embeddings=tied, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prompts() -> Dataset:
    """Sums of one and two digits: padding differs."""
    return Dataset.from_list([{"prompt": f"{i * 7 % 23}+{i % 10}="} for i in range(64)])


def thirds(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward that differs among the completions of a prompt."""
    return [sum(i % 3 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def grpo(
    trainer: type,
    model: Path | PreTrainedModel,
    output: Path,
    config: type = GRPOConfig,
    peft_config: object = None,
    **settings: object,
):
    """A trainer of a model, or of the one in a folder."""
    return trainer(
        model=str(model) if isinstance(model, Path) else model,
        reward_funcs=thirds,
        args=config(output_dir=str(output), **{**GRPO_SETTINGS, **settings}),
        train_dataset=prompts(),
        peft_config=peft_config,
    )


def logged(trainer) -> list[dict[str, float]]:
    """What a run logs at each step, without times; a NaN, which TRL logs too, is None."""
    return [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in entry.items()
            if not any(word in name for word in TIMES)
        }
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
