"""What a `GRPOTrainer` is set to, as `grpo_loss` takes it; or which setting has no such form.

The fields are those that docs/losses.md lists under TRL.
"""

from __future__ import annotations

from typing import Protocol

from accelerate.utils import is_peft_model
from torch import Tensor
from trl import GRPOTrainer

from fastgrpo import LossConfig

TOKENS: dict[str, object] = {"aggregation": "token_mean"}
LOSS_TYPES: dict[str, dict[str, object]] = {
    "grpo": {},
    "bnpo": TOKENS,
    "dapo": TOKENS,
    "dr_grpo": {"aggregation": "fixed_length"},
    "luspo": {"aggregation": "sequence_sum"},
    "cispo": {"surrogate": "cispo_raw", **TOKENS},
    "sapo": {"surrogate": "sapo"},
    "vespo": {"surrogate": "vespo", "log_ratio_clamp": 20.0, **TOKENS},
}
OF_THE_BATCH = ("dapo", "cispo", "vespo")  # their denominator is counted when a batch is generated
CORRECTIONS = {
    "token_truncate": "token_tis",
    "token_mask": "icepop",
    "sequence_truncate": "sequence_tis",
    "sequence_mask": "sequence_mis",
}
# Weights stop at e^80, below this.
NO_BOUND = 1e37


class NotFused(Exception):
    """Names the setting for which TRL's own loss has to run."""


class Inputs(Protocol):
    """What TRL gives `_compute_loss`: tensors by name."""

    def __getitem__(self, name: str) -> Tensor: ...

    def get(self, name: str) -> Tensor | None: ...


def loss_mask(inputs: Inputs) -> Tensor:
    """Return the tokens (B, T) bool that count: those of the completion that no tool wrote."""
    mask, tools = inputs["completion_mask"].bool(), inputs.get("tool_mask")
    return mask if tools is None else mask & tools.bool()


def normalizer(trainer: GRPOTrainer, inputs: Inputs) -> float | Tensor:
    """Return what TRL divides the sum over a micro-batch by, gradient accumulation included."""
    steps, sequences = accumulation_steps(trainer), len(inputs["completion_ids"])
    if trainer.loss_type in OF_THE_BATCH:
        share = steps / trainer.args.steps_per_generation if trainer.model.training else 1.0
        ranks = trainer.accelerator.num_processes
        return inputs["num_items_in_batch"].clamp(min=1.0) * share / ranks
    if trainer.loss_type == "bnpo":
        return loss_mask(inputs).sum().clamp(min=1) * steps
    if trainer.loss_type == "dr_grpo":
        return sequences * trainer.max_completion_length * steps
    return sequences * steps


def accumulation_steps(trainer: GRPOTrainer) -> int:
    """Return the micro-batches of an optimizer step; there is no such step in an evaluation."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1


def loss_config(trainer: GRPOTrainer, inputs: Inputs) -> LossConfig:
    """Return the loss of a micro-batch. Raises `NotFused` where `grpo_loss` has none like it."""
    for setting in _without_equal(trainer, inputs):
        raise NotFused(setting)
    fields = {
        **LOSS_TYPES[trainer.loss_type],
        **_shape(trainer),
        **_masks(trainer, inputs),
        **_correction(trainer),
        "ratio_level": _ratio_level(trainer),
        "entropy": "detached",
        "entropy_coef": _entropy_coef(trainer, inputs),
    }
    if trainer.beta:
        gradient = "importance" if trainer.args.use_bias_correction_kl else "value"
        fields |= {"beta": trainer.beta, "kl_gradient": gradient}
    try:
        return LossConfig(**fields)
    except ValueError as error:
        raise NotFused(f"loss_type={trainer.loss_type!r}: {error}") from None


def _without_equal(trainer: GRPOTrainer, inputs: Inputs) -> list[str]:
    """Return the settings that `grpo_loss` does not cover, or that were never tried with it."""
    found = []
    if trainer.loss_type not in LOSS_TYPES:
        found.append(f"loss_type={trainer.loss_type!r}")
    if trainer.is_deepspeed_enabled:
        found.append("a model that DeepSpeed shards")
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        found.append("a model that FSDP 1 shards")
    if virtual := _virtual_tokens(trainer):
        found.append(f"{virtual}, whose virtual tokens have hidden states too")
    if trainer.args.torch_compile:
        found.append("torch_compile=True")
    quantile = trainer.top_entropy_quantile
    if quantile < 1 and trainer.accelerator.num_processes > 1:
        found.append(f"top_entropy_quantile={quantile}, a quantile over several processes")
    if quantile < 1 and trainer._entropy_bonus_enabled:
        found.append(f"top_entropy_quantile={quantile} beside an entropy bonus")
    if trainer._entropy_bonus_enabled and trainer.loss_type in ("grpo", "sapo"):
        found.append(
            f"entropy_coef={trainer.entropy_coef}: a mean over tokens beside "
            f"loss_type={trainer.loss_type!r}, a mean over sequences"
        )
    threshold = trainer.off_policy_mask_threshold
    if threshold is not None and threshold < 0 and _on_policy(inputs):
        found.append(f"off_policy_mask_threshold={threshold}, which the policy itself exceeds")
    if corrects(trainer) and inputs.get("sampling_per_token_logps") is None:
        found.append("vllm_importance_sampling_correction=True without the sampler's log-probs")
    return found


def _virtual_tokens(trainer: GRPOTrainer) -> str | None:
    """Return the name of a PEFT method that puts tokens of its own before the prompt."""
    configs = trainer.model.peft_config.values() if is_peft_model(trainer.model) else ()
    return next((config.peft_type.value for config in configs if config.is_prompt_learning), None)


def corrects(trainer: GRPOTrainer) -> bool:
    """Whether the policy loss is weighed by the gap between trainer and inference engine."""
    return trainer.use_vllm and trainer.vllm_importance_sampling_correction


def _ratio_level(trainer: GRPOTrainer) -> str:
    """Return whose ratios count. VESPO's weight is the sequence's at either level: only a KL that
    is corrected by the ratio tells them apart.
    """
    corrected_kl = trainer.beta and trainer.args.use_bias_correction_kl
    if trainer.loss_type == "vespo" and not corrected_kl:
        return "token"
    return trainer.importance_sampling_level


def _shape(trainer: GRPOTrainer) -> dict[str, object]:
    """Return the surrogate's parameters; TRL ignores those of the others."""
    args, loss_type = trainer.args, trainer.loss_type
    if loss_type == "cispo":
        return {"epsilon_high": trainer.epsilon_high}
    if loss_type == "sapo":
        names = ("sapo_temperature_pos", "sapo_temperature_neg")
    elif loss_type == "vespo":
        names = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
    else:
        bounds = {"epsilon_low": trainer.epsilon_low, "epsilon_high": trainer.epsilon_high}
        return {**bounds, "delta": args.delta}
    return {name: getattr(args, name) for name in names}


def _masks(trainer: GRPOTrainer, inputs: Inputs) -> dict[str, object]:
    """Return what takes the policy loss from tokens and sequences."""
    # Where the policy is its own sampler the gap is 0, and below any threshold that is fused.
    threshold = None if _on_policy(inputs) else trainer.off_policy_mask_threshold
    quantile = trainer.top_entropy_quantile
    return {"off_policy_mask_threshold": threshold, "top_entropy_quantile": quantile}


def _on_policy(inputs: Inputs) -> bool:
    names = ("old_per_token_logps", "sampling_per_token_logps")
    return all(inputs.get(name) is None for name in names)


def _correction(trainer: GRPOTrainer) -> dict[str, object]:
    if not corrects(trainer):
        return {}
    low = trainer.vllm_importance_sampling_clip_min
    high = trainer.vllm_importance_sampling_clip_max
    return {
        "correction": CORRECTIONS[trainer.vllm_importance_sampling_mode],
        "correction_min": 0.0 if low is None else low,
        "correction_max": NO_BOUND if high is None else high,
    }


def _entropy_coef(trainer: GRPOTrainer, inputs: Inputs) -> float:
    """Return TRL's coefficient, of a mean over the tokens, in the weights of the loss."""
    adaptive = trainer.use_adaptive_entropy
    if adaptive and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    if not trainer.entropy_coef:
        return 0.0
    tokens = loss_mask(inputs).sum().clamp(min=1) * accumulation_steps(trainer)
    return trainer.entropy_coef * float(normalizer(trainer, inputs) / tokens)
