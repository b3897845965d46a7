"""The flags of the training script, unchecked: `TrainConfig` is these with their rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fastgrpo import LossConfig

from .defaults import PRESETS, shown_defaults
from .loss_flags import loss_config

# Those that look at differences of rewards alone, and at nothing else.
Estimator = Literal["grpo", "dr_grpo", "grpo_loo", "grpo_passk", "rloo"]


def _flag(default: Any, text: str) -> Any:
    if default is not None and default is not False:
        text += f" By default {default}."
    return field(default=default, metadata={"help": text})


def _several(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text, "action": "extend"})


def _default(name: str, text: str) -> Any:
    return field(default=None, metadata={"help": f"{text} {shown_defaults(name)}"})


@dataclass
class Flags:
    """A value for each flag; None is a default that depends on other flags."""

    preset: str | None = _flag(
        None, f"Defaults of a known program: {', '.join(PRESETS)} (theLMbook's GRPO.py)."
    )
    task: Literal["arithmetic", "sums", "differences", "gsm8k", "jsonl"] | None = _flag(
        None,
        "What to learn; by default arithmetic or the preset's. sums, differences: questions for an "
        "instruct model; jsonl: --data.",
    )
    model: str | None = _flag(
        None,
        "GGUF file, folder, LoRA adapter's folder or hub name; by default arithmetic makes a tiny "
        "model.",
    )
    data: str | None = _flag(
        None,
        "JSONL file to train on. gsm8k: 'question' and 'answer' on every line; jsonl: 'prompt' (a "
        "text or messages) or 'messages', and what else rewards want.",
    )
    eval_data: str | None = _flag(
        None, "JSONL file to evaluate on; without it part of the data is held out."
    )
    reward: list[str] = _several(
        "FILE.py:function, one or more, in place of the task's rewards; called as in TRL: "
        "f(prompts, completions, **columns) -> one number for each completion."
    )
    reward_weight: list[float] = _several("Weight of each reward in their sum; by default 1.")
    reward_timeout: float = _flag(
        300.0,
        "Seconds after which a call of a reward of --reward is given up, and its process killed; "
        "0 = no process of its own and no limit.",
    )
    accuracy: str | None = _flag(
        None,
        "REWARD=NUMBER: a held-out completion is right if this reward is at least this number. "
        "REWARD is a function of --reward or one of the task's own (gsm8k: correctness, format; "
        "else: correct). By default the task's own judgement, if it has one.",
    )
    output_dir: str | None = _flag(None, "Run folder; by default a new one under runs/.")
    resume: str | None = _flag(
        None,
        "Folder of a run that ended before its last step: it goes on from its newest checkpoint, "
        "with its settings and no other flag.",
    )
    checkpoint_every: int = _flag(
        50, "Steps between checkpoints, from which --resume goes on; 0 = only when the run is cut."
    )
    keep: int = _flag(2, "Checkpoints that are kept; older ones are removed.")
    seed: int = _flag(0, "Seed of data, weights and sampling.")
    device: str = _flag("auto", "auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = _flag(
        "auto", "Dtype of the model; auto: bfloat16 on CUDA, else float32."
    )
    backend: Literal["auto", "triton", "torch"] = _flag("auto", "Implementation of the fused loss.")
    fsdp: bool = _flag(
        False,
        "Under torchrun: weights, gradients and AdamW's averages lie in parts in the processes "
        "(FSDP2); what is needed is gathered.",
    )
    lora_rank: int = _flag(
        0, "Rank of a LoRA adapter, which learns alone; 0 = no adapter, all weights learn."
    )
    lora_alpha: float = _flag(16.0, "The adapter's output is scaled by this / rank.")
    lora_target_modules: list[str] = _several(
        "Modules that get an adapter; by default every linear one but the head."
    )
    gradient_checkpointing: bool = _flag(
        False, "Recompute activations in the backward: less memory, slower."
    )

    loss: str | None = _default(
        "loss", "A preset of fastgrpo.LossConfig: grpo, dapo, dr_grpo, cispo, gspo, ..."
    )
    loss_option: list[str] = _several(
        "key=value for a field of LossConfig, such as epsilon_high=0.28."
    )
    advantage_estimator: Estimator | None = _flag(
        None,
        "How rewards of a group become advantages, as in fastgrpo.group_advantages. By default "
        "dr_grpo (no division by the standard deviation) with the loss of that name, else grpo.",
    )
    sparsity: float = _flag(
        0.0, "Threshold tau of the sparse backward: an unbiased estimate; 0 = exact."
    )
    beta: float | None = _default(
        "beta",
        "Weight of the KL to the starting model, 0 = no reference model. A --loss that has one of "
        "its own (lmbook, nemo_grpo, dsv32) brings it.",
    )
    ref_model_sync_steps: int | None = _default(
        "ref_model_sync_steps", "Steps after which the policy becomes the reference; 0 = never."
    )
    temperature: float | None = _default(
        "temperature", "Temperature of the sampling, and of the loss."
    )
    top_k: int = _flag(0, "Only so many of the likeliest tokens are sampled from; 0 = all.")
    top_p: float = _flag(
        1.0, "Only the likeliest tokens are sampled from, until their mass is this; 1 = all."
    )
    min_p: float = _flag(
        0.0, "Only tokens with this times the largest probability are sampled from; 0 = all."
    )
    num_prompts: int | None = _default("num_prompts", "Prompts (groups) per step.")
    num_generations: int | None = _default(
        "num_generations", "Completions of each prompt: the group."
    )
    resample_flat_groups: int = _flag(
        0, "Most times per step that groups with equal rewards make way for further prompts (DAPO)."
    )
    num_iterations: int | None = _default(
        "num_iterations", "Optimizer steps on each batch of completions (mu)."
    )
    max_tokens_per_microbatch: int | None = _default(
        "max_tokens_per_microbatch",
        "Most tokens in one forward, padding included; no effect on the result.",
    )
    max_completion_length: int | None = _default(
        "max_completion_length",
        "Most tokens of a completion. With the longest prompt they must fit the model's context.",
    )
    max_steps: int | None = _default("max_steps", "Number of batches of completions.")
    max_minutes: float | None = _flag(
        None, "The step after which so much time has passed is the last; by default no limit."
    )
    learning_rate: float | None = _default("learning_rate", "Highest learning rate of AdamW.")
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] | None = _default(
        "lr_scheduler_type", "How it goes on from there; the first two reach 0 at the last step."
    )
    lr_warmup_steps: int | None = _default(
        "lr_warmup_steps",
        "Optimizer steps, at most all of them, over which it rises while Adam's averages settle.",
    )
    max_grad_norm: float | None = _default(
        "max_grad_norm", "Gradients are scaled down to this norm."
    )

    warmup_steps: int | None = _default("warmup_steps", "Supervised steps first (arithmetic).")
    eval_size: int | None = _default(
        "eval_size", "Held-out prompts, the same before and after; 0 = all of --eval-data."
    )
    eval_every: int | None = _default(
        "eval_every", "Steps between held-out evaluations; 0 = only before and after."
    )
    log_completions_every: int | None = _default(
        "log_completions_every", "Steps between sample completions in console and file; 0 = none."
    )
    tensorboard: bool = _flag(False, "Write the metrics for TensorBoard too, into the run folder.")

    def loss_config(self) -> LossConfig:
        """Return the loss that the flags describe; the entropy is computed as a metric only."""
        return loss_config(self.loss, self.loss_option, self.beta, self.max_completion_length)

    def starts_iteration(self, step: int) -> bool:
        """Return whether the policy becomes the reference before this step, counted from 1."""
        every = self.ref_model_sync_steps
        return every > 0 and step > 1 and step % every == 1 % every

    def accuracy_threshold(self) -> tuple[str, float]:
        """Return the reward that ``accuracy`` names, and its threshold."""
        name, _, number = self.accuracy.partition("=")
        try:
            return name, float(number)
        except ValueError as error:
            raise ValueError(f"accuracy: expected REWARD=NUMBER, got {self.accuracy!r}") from error
