"""How tokens are weighed, and the denominators of losses that span micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo import checks
from fastgrpo.objective.config import LossConfig
from fastgrpo.objective.segments import Sequences


def token_weights(
    config: LossConfig,
    owner: Sequences,
    rows: Tensor | slice,  # (n,) the unmasked rows
    groups: Tensor | None,  # (B,) int64 each sequence's prompt, for "prompt_mean"
    normalizer: Tensor | None,  # ()
    dtype: torch.dtype,
) -> Tensor:
    """Return each row's weight (n,): its share, divided by `normalizer` or by a local count."""
    lengths, sequence = owner.lengths, owner.index[rows]
    share = torch.ones_like(sequence, dtype=dtype)
    local: int | Tensor = max(len(lengths), 1)
    if config.aggregation == "token_mean":
        local = lengths.sum().clamp(min=1)
    elif config.aggregation == "token_sum":
        local = 1
    elif config.aggregation == "fixed_length":
        local *= config.max_completion_length or 1
    elif config.aggregation == "sequence_mean":
        share = share / lengths[sequence]
    elif config.aggregation == "prompt_mean":
        prompts, index = groups.unique(return_inverse=True)
        tokens = torch.zeros_like(prompts).index_add_(0, index, lengths)
        local = max(len(prompts), 1)
        share = share / tokens[index[sequence]]
    return (share / (local if normalizer is None else normalizer)).to(dtype)


def count_normalizer(
    completion_masks: Tensor | Iterable[Tensor],
    config: str | LossConfig = "grpo",
    *,
    group_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the denominator of one optimizer step, (): what `normalizer` takes.

    Args:
        completion_masks: the (B, T) bool masks of all micro-batches of the step (or one of them);
            where tokens are counted, packed ones (N,) too.
        config: the loss; its aggregation decides what is counted: tokens for "token_mean",
            sequences for "sequence_mean" and "sequence_sum", sequences * max_completion_length for
            "fixed_length", prompts for "prompt_mean".
        group_size: completions per prompt, for "prompt_mean".
        process_group: the data-parallel ranks, whose counts are added up in one all-reduce and
            divided by their number, as DDP and FSDP average gradients. None: this rank alone.

    int64, and fp32 with process_group. At least 1 over all, so that an empty step gives 0.

    Raises:
        ValueError: for a wrong shape or dtype, for group_size with another aggregation, and for
            "token_sum", which has no denominator.
    """
    config = LossConfig.preset(config) if isinstance(config, str) else config
    if not isinstance(config, LossConfig):
        raise ValueError(f"config: expected a preset's name or a LossConfig, got {config!r}")
    masks = [completion_masks] if isinstance(completion_masks, Tensor) else list(completion_masks)
    if not masks:
        raise ValueError("completion_masks: expected at least one mask, got none")
    for mask in masks:
        checks.tensor("completion_masks", mask, dtypes=(torch.bool,))
        if mask.dim() != 2 and (mask.dim(), config.aggregation) != (1, "token_mean"):
            raise ValueError(f"completion_masks: expected shape (B, T), got {tuple(mask.shape)}")
    if group_size is not None and config.aggregation != "prompt_mean":
        raise ValueError(f"group_size has no effect with aggregation={config.aggregation!r}")
    count = _count(masks, config, group_size)
    if process_group is None:
        return count.clamp(min=1)
    dist.all_reduce(count, group=process_group)
    return count.clamp(min=1) / process_group.size()


def _count(masks: list[Tensor], config: LossConfig, group_size: int | None) -> Tensor:
    """Return the number of tokens, sequences or prompts, () int64."""
    if config.aggregation == "token_sum":
        raise ValueError("config: expected an aggregation with a denominator, got 'token_sum'")
    if config.aggregation == "token_mean":
        return torch.stack([mask.sum() for mask in masks]).sum()
    sequences = sum(len(mask) for mask in masks)
    if config.aggregation == "prompt_mean":
        is_int = isinstance(group_size, int) and not isinstance(group_size, bool)
        if not is_int or group_size < 1 or sequences % group_size:
            raise ValueError(
                f"group_size: expected a divisor of the {sequences} completions, got {group_size!r}"
            )
        sequences //= group_size
    if config.aggregation == "fixed_length":
        if config.max_completion_length is None:
            raise ValueError("config: expected max_completion_length to be set for 'fixed_length'")
        sequences *= config.max_completion_length
    return torch.tensor(sequences, device=masks[0].device)
