"""TrainConfig: every flag of the training script, and which values cannot work."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, Literal, NoReturn, get_args

from transformers import HfArgumentParser

from fastgrpo import LossConfig

from .defaults import DEFAULTS, PRESETS, TASK_DEFAULTS, default_of, shown_defaults
from .loss_flags import loss_config
from .rewards import load_rewards

NEEDS_DATA = ("gsm8k", "jsonl")
# Those that look at differences of rewards alone, and at nothing else.
Estimator = Literal["grpo", "dr_grpo", "grpo_loo", "grpo_passk", "rloo"]
AT_LEAST_1 = (
    "num_prompts", "num_iterations", "max_tokens_per_microbatch", "max_completion_length"
)  # fmt: skip
AT_LEAST_0 = (
    "max_steps", "warmup_steps", "eval_size", "eval_every", "learning_rate", "beta", "sparsity",
    "lora_rank", "ref_model_sync_steps", "lr_warmup_steps", "log_completions_every",
    "resample_flat_groups", "seed",
)  # fmt: skip
POSITIVE = ("temperature", "max_grad_norm", "max_minutes", "lora_alpha")


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _several(text: str) -> Any:
    return field(default_factory=list, metadata={"help": text, "action": "extend"})


def _default(name: str, text: str) -> Any:
    return field(default=None, metadata={"help": f"{text} {shown_defaults(name)}"})


@dataclass
class TrainConfig:
    """Settings of one run. A field that is None takes its value from ``fastgrpo.train.defaults``.

    What cannot work is a ValueError that names the field, what was expected and what came.
    """

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
    accuracy: str | None = _flag(
        None,
        "REWARD=NUMBER: a held-out completion is right if this reward is at least this number. By "
        "default the task's own judgement, if it has one.",
    )
    output_dir: str | None = _flag(None, "Run folder; by default a new one under runs/.")
    seed: int = _flag(0, "Seed of data, weights and sampling.")
    device: str = _flag("auto", "auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = _flag(
        "auto", "Dtype of the model; auto: bfloat16 on CUDA, else float32."
    )
    backend: Literal["auto", "triton", "torch"] = _flag("auto", "Implementation of the fused loss.")
    lora_rank: int = _flag(0, "Rank of a LoRA adapter, which learns alone; 0 = all weights learn.")
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
        "lr_warmup_steps", "Steps over which it rises, while Adam's averages settle."
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

    def __post_init__(self) -> None:
        if self.preset is not None:
            self._apply_preset()
        if self.task is None:
            self.task = "arithmetic"
        if self.beta is None and self.loss is not None:
            self.beta = LossConfig.preset(self.loss).beta or None
        if self.task not in TASK_DEFAULTS:
            raise ValueError(f"task: expected one of {sorted(TASK_DEFAULTS)}, got {self.task!r}")
        for name in DEFAULTS:
            if getattr(self, name) is None:
                setattr(self, name, default_of(name, self.task, self.preset))
        if self.advantage_estimator is None:
            self.advantage_estimator = "dr_grpo" if self.loss == "dr_grpo" else "grpo"
        self._check_numbers()
        self._check_task()
        self._check_combinations()
        if self.tensorboard and find_spec("tensorboard") is None:
            raise ValueError(
                "tensorboard: needs the package tensorboard, which is not installed: "
                "pip install 'fastgrpo[tensorboard]'"
            )
        load_rewards(self.reward, self.reward_weight or None)
        self.loss_config()

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

    def _apply_preset(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {self.preset!r}")
        preset = PRESETS[self.preset]
        if self.task is None:
            self.task = preset["task"]
        self.gradient_checkpointing |= preset["gradient_checkpointing"]
        if self.loss is not None:  # a loss of one's own has bounds of its own
            return
        given = {option.partition("=")[0] for option in self.loss_option}
        self.loss_option = self.loss_option + [
            option for option in preset["loss_option"] if option.partition("=")[0] not in given
        ]

    def _check_numbers(self) -> None:
        for name in AT_LEAST_1:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in AT_LEAST_0:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in POSITIVE:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.num_generations < 2:
            raise ValueError(
                "num_generations: expected at least 2, as an advantage is a comparison within the "
                f"group, got {self.num_generations}"
            )
        if self.sparsity and not 1e-6 <= self.sparsity < 1:
            raise ValueError(f"sparsity: expected 0 or from 1e-6 to below 1, got {self.sparsity}")

    def _check_task(self) -> None:
        if self.task != "arithmetic":
            if not self.model:
                raise ValueError(f"task {self.task}: expected a model, got none")
            if self.warmup_steps:
                raise ValueError(
                    f"warmup_steps: no effect on {self.task}, which has no demonstrations"
                )
        if self.task in NEEDS_DATA:
            if not self.data:
                raise ValueError(f"task {self.task}: expected data (a JSONL file), got none")
        elif self.data or self.eval_data or not self.eval_size:
            raise ValueError(f"task {self.task}: takes no data or eval_data, and an eval_size >= 1")
        if self.task == "jsonl" and not self.reward:
            raise ValueError("task jsonl: expected a reward (FILE.py:function), got none")

    def _check_combinations(self) -> None:
        if self.advantage_estimator not in get_args(Estimator):
            raise ValueError(
                f"advantage_estimator: expected one of {get_args(Estimator)}, got "
                f"{self.advantage_estimator!r}"
            )
        if self.reward_weight and not self.reward:
            raise ValueError("reward_weight: no effect without reward")
        if self.accuracy is not None:
            name, _ = self.accuracy_threshold()
            names = [path.rpartition(":")[2] for path in self.reward]
            if name not in names:
                raise ValueError(f"accuracy: expected one of the rewards {names}, got {name!r}")
        if self.ref_model_sync_steps and not self.beta:
            raise ValueError("ref_model_sync_steps: no effect with beta 0, without a reference")
        if self.lora_rank and self.model is None:
            raise ValueError("lora_rank: expected a model that the adapter is for, got none")
        changed = [n for n in ("lora_alpha", "lora_target_modules") if self._differs(n)]
        if changed and not self.lora_rank:
            raise ValueError(f"{changed[0]}: no effect without lora_rank")

    def _differs(self, name: str) -> bool:
        default = {f.name: f for f in fields(self)}[name]
        missing = default.default if default.default_factory is not list else []
        return getattr(self, name) != missing


def parse_flags(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Return the settings of a command line; a wrong one ends the process with one line."""
    with one_line_errors():
        parser = HfArgumentParser(TrainConfig)
        parser.error = _error
        return parser.parse_args_into_dataclasses(arguments)[0]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Context for what the user's settings decide: a ValueError there is one line, not a trace."""
    try:
        yield
    except ValueError as error:
        _error(str(error))


def _error(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
