"""Which values each flag may have, and beside which others it has an effect."""

from __future__ import annotations

import math
from dataclasses import fields
from importlib.util import find_spec
from typing import Literal, get_args, get_origin, get_type_hints

from .flags import Flags
from .rewards import load_rewards
from .sampling import check_filters

CHOICES = {
    name: get_args(kind)
    for name, hint in get_type_hints(Flags).items()
    for kind in (hint, *get_args(hint))
    if get_origin(kind) is Literal
}

NEEDS_DATA = ("gsm8k", "jsonl")
AT_LEAST_1 = (
    "num_prompts", "num_iterations", "max_tokens_per_microbatch", "max_completion_length", "keep"
)  # fmt: skip
AT_LEAST_0 = (
    "max_steps", "warmup_steps", "eval_size", "eval_every", "learning_rate", "beta", "sparsity",
    "lora_rank", "ref_model_sync_steps", "lr_warmup_steps", "log_completions_every",
    "resample_flat_groups", "seed", "checkpoint_every",
    "reward_timeout",
)  # fmt: skip
POSITIVE = ("temperature", "max_grad_norm", "max_minutes", "lora_alpha")
FINITE = ("learning_rate", "beta", "temperature", "lora_alpha")


def check_flags(config: Flags) -> None:
    """Raise ValueError for a wrong value, for one without effect, and for what is missing."""
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {getattr(config, name)!r}")
    _check_numbers(config)
    _check_task(config)
    _check_combinations(config)
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard: needs the package tensorboard, which is not installed: "
            "pip install 'fastgrpo[tensorboard]'"
        )
    load_rewards(config.reward, config.reward_weight or None)
    config.loss_config()


def _check_numbers(config: Flags) -> None:
    for name in AT_LEAST_1:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(config, name)}")
    for name in AT_LEAST_0:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name}: expected at least 0, got {getattr(config, name)}")
    for name in POSITIVE:
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise ValueError(f"{name}: expected a positive number, got {getattr(config, name)}")
    for name in FINITE:
        if not math.isfinite(getattr(config, name)):
            raise ValueError(f"{name}: expected a finite number, got {getattr(config, name)}")
    if config.seed >= 2**32:
        raise ValueError(f"seed: expected below 2**32, got {config.seed}")
    if config.num_generations < 2:
        raise ValueError(
            "num_generations: expected at least 2, as an advantage is a comparison within the "
            f"group, got {config.num_generations}"
        )
    if config.sparsity and not 1e-6 <= config.sparsity < 1:
        raise ValueError(f"sparsity: expected 0 or from 1e-6 to below 1, got {config.sparsity}")
    check_filters(config.top_k, config.top_p, config.min_p)


def _check_task(config: Flags) -> None:
    if config.task != "arithmetic":
        if not config.model:
            raise ValueError(f"task {config.task}: expected a model, got none")
        if config.warmup_steps:
            raise ValueError(
                f"warmup_steps: no effect on {config.task}, which has no demonstrations"
            )
    if config.task in NEEDS_DATA:
        if not config.data:
            raise ValueError(f"task {config.task}: expected data (a JSONL file), got none")
    elif config.data or config.eval_data or not config.eval_size:
        raise ValueError(f"task {config.task}: takes no data or eval_data, and an eval_size >= 1")
    if config.task == "jsonl" and not config.reward:
        raise ValueError("task jsonl: expected a reward (FILE.py:function), got none")


def _check_combinations(config: Flags) -> None:
    if config.reward_weight and not config.reward:
        raise ValueError("reward_weight: no effect without reward")
    if _differs(config, "reward_timeout") and not config.reward:
        raise ValueError("reward_timeout: no effect without reward")
    if not all(map(math.isfinite, config.reward_weight)):
        raise ValueError(f"reward_weight: expected finite numbers, got {config.reward_weight}")
    if config.accuracy is not None and not math.isfinite(config.accuracy_threshold()[1]):
        raise ValueError(f"accuracy: expected REWARD=NUMBER, got {config.accuracy!r}")
    if config.ref_model_sync_steps and not config.beta:
        raise ValueError("ref_model_sync_steps: no effect with beta 0, without a reference")
    steps = config.max_steps * config.num_iterations
    if config.lr_warmup_steps > steps:
        raise ValueError(
            f"lr_warmup_steps: expected at most {steps}, which is max_steps times "
            f"num_iterations, got {config.lr_warmup_steps}"
        )
    filters = [name for name in ("top_k", "top_p", "min_p") if _differs(config, name)]
    if filters and config.sparsity:
        raise ValueError(
            f"sparsity: expected 0 with {filters[0]}, whose gradient is exact, got "
            f"{config.sparsity}"
        )
    if config.lora_rank and config.model is None:
        raise ValueError("lora_rank: expected a model that the adapter is for, got none")
    changed = [n for n in ("lora_alpha", "lora_target_modules") if _differs(config, n)]
    if changed and not config.lora_rank:
        raise ValueError(f"{changed[0]}: no effect without lora_rank")


def _differs(config: Flags, name: str) -> bool:
    default = {f.name: f for f in fields(config)}[name]
    missing = default.default if default.default_factory is not list else []
    return getattr(config, name) != missing
