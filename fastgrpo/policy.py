"""From log-probs to the loss and its derivative: everything that is O(tokens).

    log_ratio = logp - old_logp, or its mean over the sequence
    loss      = sum over tokens of weight * (surrogate + beta * kl - entropy_coef * entropy)

The weights carry the aggregation and its normalizer. Rows are packed: masked ones are gone.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.config import LossConfig
from fastgrpo.tiles import Logps, Upstream


class PolicyRows(NamedTuple):
    """What the loss knows about its rows besides their log-probs."""

    advantages: Tensor  # (n,)
    weights: Tensor  # (n,)
    old_logps: Tensor | None  # (n,)
    ref_logps: Tensor | None  # (n,)

    def __getitem__(self, index: slice) -> PolicyRows:  # type: ignore[override]
        return PolicyRows(*(None if x is None else x[index] for x in self))


class PolicyLoss(NamedTuple):
    loss: Tensor  # ()
    upstream: Upstream
    stats: Tensor  # (len(METRICS) + 1,) sums over rows, and how many these are


METRICS = ("kl", "ratio_mean", "clip_low", "clip_high", "approx_kl", "live_rows", "entropy")
"""What `PolicyLoss.stats` sums: the backends' `STATS`, rows with a gradient, entropy."""


def policy_loss(
    impl: ModuleType,
    config: LossConfig,
    scored: Logps,
    rows: PolicyRows,
    cu_seqlens: Tensor | None = None,  # (B + 1,), needed for a sequence-level ratio
) -> PolicyLoss:
    """Return the loss of some rows, its derivatives by their log-probs and entropies, and sums."""
    logps, entropy = scored.logps, scored.entropy
    on_policy = rows.old_logps is None
    log_ratio = torch.zeros_like(logps) if on_policy else logps - rows.old_logps
    by_sequence = config.ratio_level == "sequence"
    if by_sequence and not on_policy:
        log_ratio = impl.segment_mean(log_ratio, cu_seqlens)
    loss, dpolicy, dkl, stats = impl.token_loss(
        logps, log_ratio, rows.ref_logps, rows.advantages, rows.weights, config.surrogate,
        config.kl, config.epsilon_low, config.epsilon_high, config.delta or 0.0, config.beta,
    )  # fmt: skip
    if by_sequence:
        # The ratio of a sequence depends on each of its n tokens with slope 1/n.
        dpolicy = impl.segment_mean(dpolicy, cu_seqlens)
    dlogps, dentropy = dpolicy if dkl is None else dpolicy + dkl, None
    if config.entropy_coef:
        loss = loss - config.entropy_coef * rows.weights * entropy
        dentropy = -config.entropy_coef * rows.weights
    live = dlogps != 0 if dentropy is None else (dlogps != 0) | (dentropy != 0)
    entropy_sum = logps.new_zeros(()) if entropy is None else entropy.sum()
    count = logps.new_full((), len(logps))
    stats = torch.cat([stats, torch.stack([live.sum(dtype=logps.dtype), entropy_sum, count])])
    return PolicyLoss(loss.sum(), Upstream(dlogps, dentropy), stats)


def token_weights(
    config: LossConfig,
    lengths: Tensor,  # (B,) int64 unmasked tokens of each sequence
    sequence: Tensor,  # (n,) int64 each row's sequence
    normalizer: Tensor | None,  # ()
    dtype: torch.dtype,
) -> Tensor:
    """Return each row's weight (n,): its share of the loss, over `normalizer` or a local count."""
    if config.aggregation == "token_mean":
        local = lengths.sum().clamp(min=1)
    elif config.aggregation == "sequence_mean":
        local = lengths.new_tensor(max(len(lengths), 1))
    else:
        local = lengths.new_tensor(max(len(lengths), 1) * (config.max_completion_length or 1))
    weight = (local if normalizer is None else normalizer).to(dtype).reciprocal()
    if config.aggregation == "sequence_mean":
        return weight / lengths[sequence].to(dtype)
    return weight.expand(len(sequence)).contiguous()
