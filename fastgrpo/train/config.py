"""TrainConfig: every flag of the training script, with defaults that depend on the task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fastgrpo import LossConfig

# Arithmetic is small enough to show progress within minutes on two CPU cores. GSM8K follows the
# usual recipe for 0.5-4B instruct models.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "arithmetic": {
        "num_prompts": 32,
        "num_generations": 8,
        "micro_batch_size": 256,
        "max_completion_length": 5,
        "max_steps": 200,
        "learning_rate": 3e-4,
        "max_grad_norm": 1.0,
        "beta": 0.001,
        "warmup_steps": 400,
        "eval_size": 512,
        "eval_every": 10,
    },
    "gsm8k": {
        "num_prompts": 4,
        "num_generations": 16,
        "micro_batch_size": 8,
        "max_completion_length": 500,
        "max_steps": 500,
        "learning_rate": 1e-6,
        "max_grad_norm": 0.1,
        "beta": 0.04,
        "warmup_steps": 0,
        "eval_size": 256,
        "eval_every": 0,
    },
}


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _by_task(name: str, text: str) -> Any:
    values = ", ".join(f"{task}: {known[name]}" for task, known in TASK_DEFAULTS.items())
    return field(default=None, metadata={"help": f"{text} By default {values}."})


@dataclass
class TrainConfig:
    """Settings of one run. A field that is None takes the task's value from TASK_DEFAULTS."""

    task: Literal["arithmetic", "gsm8k"] = _flag("arithmetic", "What to learn.")
    model: str | None = _flag(
        None, "Model folder or hub name; by default arithmetic makes a tiny model."
    )
    data: str | None = _flag(
        None, "JSONL file to train on (gsm8k), with 'question' and 'answer' on every line."
    )
    eval_data: str | None = _flag(
        None, "JSONL file to evaluate on; without it part of the data is held out."
    )
    output_dir: str | None = _flag(None, "Run folder; by default a new one under runs/.")
    seed: int = _flag(0, "Seed of data, weights and sampling.")
    device: str = _flag("auto", "auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = _flag(
        "auto", "Dtype of the model; auto: bfloat16 on CUDA, else float32."
    )
    backend: Literal["auto", "triton", "torch"] = _flag("auto", "Implementation of the fused loss.")

    loss: str = _flag(
        "grpo", "A preset of fastgrpo.LossConfig: grpo, dapo, dr_grpo, cispo, gspo, ..."
    )
    beta: float | None = _by_task(
        "beta", "Weight of the KL to the starting model; 0 = no reference model."
    )
    temperature: float = _flag(1.0, "Temperature of the sampling, and of the loss.")
    num_prompts: int | None = _by_task("num_prompts", "Prompts (groups) per step.")
    num_generations: int | None = _by_task(
        "num_generations", "Completions of each prompt: the group."
    )
    num_iterations: int = _flag(1, "Optimizer steps on each batch of completions (mu).")
    micro_batch_size: int | None = _by_task(
        "micro_batch_size", "Completions in one forward; no effect on the result."
    )
    max_completion_length: int | None = _by_task(
        "max_completion_length",
        "Most tokens of a completion. With the longest prompt they must fit the model's context.",
    )
    max_steps: int | None = _by_task("max_steps", "Number of batches of completions.")
    learning_rate: float | None = _by_task(
        "learning_rate", "Highest learning rate of AdamW; it falls linearly to 0."
    )
    max_grad_norm: float | None = _by_task(
        "max_grad_norm", "Gradients are scaled down to this norm."
    )
    gradient_checkpointing: bool = _flag(
        False, "Recompute activations in the backward: less memory, slower."
    )

    warmup_steps: int | None = _by_task("warmup_steps", "Supervised steps first (arithmetic).")
    eval_size: int | None = _by_task(
        "eval_size", "Held-out prompts, the same before and after; 0 = all of --eval-data."
    )
    eval_every: int | None = _by_task(
        "eval_every", "Steps between held-out evaluations; 0 = only before and after."
    )

    def __post_init__(self) -> None:
        if self.task not in TASK_DEFAULTS:
            raise ValueError(f"task: expected one of {sorted(TASK_DEFAULTS)}, got {self.task!r}")
        for name, value in TASK_DEFAULTS[self.task].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in (
            "num_prompts",
            "num_generations",
            "num_iterations",
            "micro_batch_size",
            "max_completion_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in (
            "max_steps",
            "warmup_steps",
            "eval_size",
            "eval_every",
            "learning_rate",
            "beta",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("temperature", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        self.loss_config()  # raises for an unknown preset before anything is loaded
        if self.task == "gsm8k":
            if not (self.data and self.model):
                raise ValueError("task gsm8k: expected data (a JSONL file) and model, got none")
            if self.warmup_steps:
                raise ValueError("warmup_steps: no effect on gsm8k, which has no demonstrations")
        elif self.data or self.eval_data or not self.eval_size:
            raise ValueError("task arithmetic: takes no data or eval_data, and an eval_size >= 1")

    def loss_config(self) -> LossConfig:
        """Return the loss that the flags describe; the entropy is computed as a metric only."""
        fields: dict[str, Any] = {"beta": self.beta, "entropy": "detached"}
        if LossConfig.preset(self.loss).aggregation == "fixed_length":
            fields["max_completion_length"] = self.max_completion_length
        return LossConfig.preset(self.loss, **fields)
