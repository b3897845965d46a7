"""The denominators of losses that span micro-batches, accumulation steps and ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastgrpo import checks
from fastgrpo.config import LossConfig


def count_normalizer(
    completion_masks: Tensor | Iterable[Tensor],
    config: str | LossConfig = "grpo",
    *,
    group_size: int | None = None,
) -> Tensor:
    """Return the denominator of one optimizer step, () int64: what `normalizer` takes.

    Args:
        completion_masks: the (B, T) bool masks of all micro-batches of the step (or one of them).
        config: the loss; its aggregation decides what is counted: tokens for "token_mean",
            sequences for "sequence_mean" and "sequence_sum", sequences * max_completion_length for
            "fixed_length", prompts for "prompt_mean".
        group_size: completions per prompt, for "prompt_mean".

    Under data parallelism sum the result over ranks, and divide it by their number where the
    framework averages gradients.

    Raises:
        ValueError: for a wrong shape or dtype, for group_size with another aggregation, and for
            "token_sum", which has no denominator.
    """
    config = LossConfig.preset(config) if isinstance(config, str) else config
    masks = [completion_masks] if isinstance(completion_masks, Tensor) else list(completion_masks)
    if not masks:
        raise ValueError("completion_masks: expected at least one mask, got none")
    for mask in masks:
        checks.tensor("completion_masks", mask, dtypes=(torch.bool,))
        if mask.dim() != 2:
            raise ValueError(f"completion_masks: expected shape (B, T), got {tuple(mask.shape)}")
    if config.aggregation == "token_sum":
        raise ValueError("config: expected an aggregation with a denominator, got 'token_sum'")
    if group_size is not None and config.aggregation != "prompt_mean":
        raise ValueError(f"group_size has no effect with aggregation={config.aggregation!r}")
    if config.aggregation == "token_mean":
        return torch.stack([mask.sum() for mask in masks]).sum().clamp(min=1)
    count = sum(len(mask) for mask in masks)
    if config.aggregation == "prompt_mean":
        if not isinstance(group_size, int) or group_size < 1 or count % group_size:
            raise ValueError(
                f"group_size: expected a divisor of the {count} completions, got {group_size!r}"
            )
        count //= group_size
    sequences = torch.tensor(max(count, 1), device=masks[0].device)
    if config.aggregation != "fixed_length":
        return sequences
    if config.max_completion_length is None:
        raise ValueError("config: expected max_completion_length to be set for 'fixed_length'")
    return sequences * config.max_completion_length
