"""What a loss needs from a call, and what it would ignore."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import checks
from fastgrpo.objective.call import LossCall
from fastgrpo.objective.config import LossConfig, config_from_key
from fastgrpo.objective.fields import surrogate_named


def check_call(
    config: LossConfig, call: LossCall, like: Tensor, sparsity: float, skip_zero_advantage: bool
) -> None:
    """Check what the loss needs from the call, and that the call gives it nothing else."""
    if config.beta and call.ref_logps is None:
        raise ValueError(f"ref_logps: expected log-probs as beta is {config.beta}, got None")
    for name, value in (("correction", config.correction), ("rejection", config.rejection)):
        if value != "none" and call.sampler_logps is None:
            raise ValueError(f"sampler_logps: expected log-probs as {name} is {value!r}, got None")
    behaviour_known = call.old_logps is not None or call.sampler_logps is not None
    if config.off_policy_mask_threshold is not None and not behaviour_known:
        raise ValueError("off_policy_mask_threshold has no effect without old_logps, sampler_logps")
    if (call.groups is None) == (config.aggregation == "prompt_mean"):
        if call.groups is not None:
            raise ValueError(
                f"group_ids_or_size has no effect with aggregation={config.aggregation!r}"
            )
        raise ValueError(
            "group_ids_or_size: expected ids or a size as aggregation is 'prompt_mean', got None"
        )
    if not isinstance(skip_zero_advantage, bool):
        raise ValueError(f"skip_zero_advantage: expected a bool, got {skip_zero_advantage!r}")
    inert, of_sequences = _facts(config.key) if skip_zero_advantage else (True, False)
    if not inert:
        raise ValueError(
            "skip_zero_advantage: expected a loss that tokens with advantage 0 have no part in, "
            "got one with a gradient there, statistics of sequences or of the batch, a KL term or "
            "an entropy bonus"
        )
    if skip_zero_advantage and (config.entropy == "differentiable"):
        raise ValueError("skip_zero_advantage has no effect with entropy='differentiable'")
    if of_sequences and call.old_logps is None:
        raise ValueError("skip_zero_advantage: expected old_logps beside a sequence's correction")
    _check_scalar("entropy_threshold", call.entropy_threshold, like)
    if call.entropy_threshold is not None and config.top_entropy_quantile == 1:
        raise ValueError("entropy_threshold has no effect with top_entropy_quantile=1")
    _check_scalar("normalizer", call.normalizer, like)
    if isinstance(call.normalizer, (int, float)):
        checks.positive("normalizer", call.normalizer)
    if call.normalizer is not None and config.aggregation == "token_sum":
        raise ValueError("normalizer has no effect with aggregation='token_sum'")
    if config.aggregation == "fixed_length" and call.normalizer is None:
        if config.max_completion_length is None:
            raise ValueError(
                "max_completion_length: expected a length in the LossConfig, or a normalizer, for "
                "aggregation='fixed_length'; got neither"
            )
    # `torch.compile` reads fields of a config, but no property.
    drawn = surrogate_named(config.surrogate).context == "drawn_covariance"
    if call.seed is not None and not drawn and not sparsity:
        raise ValueError(
            f"seed has no effect with surrogate={config.surrogate!r} and sparsity=0: nothing is "
            "drawn"
        )


@torch.compiler.assume_constant_result
def _facts(key: str) -> tuple[bool, bool]:
    """Return whether tokens of advantage 0 are inert, and whether sequences are corrected."""
    config = config_from_key(key)
    return config.zero_advantage_is_inert, config.corrects_sequences


def group_ids(given: object, sequences: int, like: Tensor) -> Tensor | None:
    """Return the group (B,) int64 of each sequence, given ids or the size of adjacent groups."""
    if given is None:
        return None
    if isinstance(given, Tensor):
        checks.tensor("group_ids_or_size", given, (sequences,), like=like, dtypes=(torch.int64,))
        return given
    if not isinstance(given, int) or isinstance(given, bool) or given < 1 or sequences % given:
        raise ValueError(
            f"group_ids_or_size: expected a divisor of the {sequences} completions, or a tensor of "
            f"ids; got {given!r}"
        )
    return torch.arange(sequences, device=like.device) // given


def _check_scalar(name: str, value: object, like: Tensor) -> None:
    """Check an optional number that may be a tensor ()."""
    if isinstance(value, Tensor):
        checks.tensor(name, value, (), like=like)
        if value.dtype == torch.bool:
            raise ValueError(f"{name}: expected a number, got a bool")
    elif value is not None:
        checks.finite(name, value)
