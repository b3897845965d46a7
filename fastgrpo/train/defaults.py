"""Defaults of the training script: of all tasks, of each task, and of presets over them."""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {
    "loss": "grpo",
    "num_prompts": 8,
    "num_generations": 8,
    "num_iterations": 1,
    "temperature": 1.0,
    "max_tokens_per_microbatch": 1024,
    "max_completion_length": 256,
    "max_steps": 200,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "lr_warmup_steps": 20,
    "max_grad_norm": 1.0,
    "beta": 0.0,
    "ref_model_sync_steps": 0,
    "warmup_steps": 0,
    "eval_size": 128,
    "eval_every": 0,
    "log_completions_every": 10,
}
# For an instruct model of about 0.1B parameters. At temperature 1 it is rarely right at first; at a
# lower one it learns faster, but soon nearly all groups are flat.
_QUESTIONS: dict[str, Any] = {
    "loss": "dapo",
    "num_prompts": 12,
    "max_completion_length": 16,
    "max_steps": 75,
    "learning_rate": 1e-5,
    "lr_warmup_steps": 5,
    "eval_every": 10,
}
# Arithmetic is small enough to show progress within minutes on two CPU cores. GSM8K follows the
# usual recipe for 0.5-4B instruct models.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "arithmetic": {
        "num_prompts": 32,
        "max_completion_length": 5,
        "learning_rate": 3e-4,
        "beta": 0.001,
        "warmup_steps": 400,
        "eval_size": 512,
        "eval_every": 10,
        "log_completions_every": 50,
    },
    "sums": _QUESTIONS,
    "differences": _QUESTIONS | {"max_steps": 120},
    "gsm8k": {
        "num_prompts": 4,
        "num_generations": 16,
        "max_tokens_per_microbatch": 4096,
        "max_completion_length": 500,
        "max_steps": 500,
        "max_grad_norm": 0.1,
        "beta": 0.04,
        "eval_size": 256,
    },
    "jsonl": {},
}
PRESETS: dict[str, dict[str, Any]] = {
    "lmbook": {
        "task": "gsm8k",
        "loss": "lmbook",
        "loss_option": ["epsilon_low=0.1", "epsilon_high=0.1"],
        "num_prompts": 4,
        "num_generations": 16,
        "num_iterations": 1,
        "max_completion_length": 500,
        "max_steps": 500,
        "learning_rate": 5e-6,
        "lr_scheduler_type": "constant_with_warmup",
        "lr_warmup_steps": 0,
        "max_grad_norm": 0.1,
        "beta": 0.04,
        "ref_model_sync_steps": 500,
        "gradient_checkpointing": True,
    },
}


def default_of(name: str, task: str, preset: str | None) -> Any:
    """Return the value of a setting that was not given."""
    layers = (PRESETS.get(preset, {}), TASK_DEFAULTS[task], DEFAULTS)
    return next(layer[name] for layer in layers if name in layer)


def shown_defaults(name: str) -> str:
    """Return the defaults of a setting as the help shows them."""
    own = [f"{task}: {known[name]}" for task, known in TASK_DEFAULTS.items() if name in known]
    preset = [f"preset {p}: {known[name]}" for p, known in PRESETS.items() if name in known]
    return f"By default {', '.join([str(DEFAULTS[name]), *own, *preset])}."
