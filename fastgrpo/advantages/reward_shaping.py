"""Shaping of rewards before they become advantages: KL, length, truncation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo import checks
from fastgrpo.advantages.groups import Groups, check_lengths, check_rewards
from fastgrpo.backend import Kernels
from fastgrpo.checks import finite, one_of
from fastgrpo.dispatch import choice
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS
from fastgrpo_kernels.twins import torch_twin


def kl_penalty(
    logps: Tensor,  # (B, T)
    ref_logps: Tensor,  # (B, T)
    completion_mask: Tensor,  # (B, T) bool
    *,
    kl: str = "k1",
) -> Tensor:
    """Return the KL to the reference estimated at each token, (B, T) fp32 nats, detached.

    For a KL term in the reward instead of in the loss:

        rewards - beta * kl_penalty(logps, ref_logps, mask).sum(1)           per completion, (B,)
        token_rewards(rewards, mask) - beta * kl_penalty(logps, ref_logps, mask)  per token, (B, T)

    Args:
        logps: (B, T) nats, of the policy that sampled the completions.
        ref_logps: (B, T) nats, of the reference policy.
        completion_mask: (B, T) bool. Masked tokens may hold anything; the result is 0 there.
        kl: with x = ref_logps - logps, "k1" = -x (what RLOO, OpenRLHF and verl take by default),
            "k2" = x^2 / 2, "k3" = exp(x) - x - 1, "abs" = |x|. Schulman 2020,
            http://joschu.net/blog/kl-approx.html.

    Raises:
        ValueError: for a wrong shape, dtype or value.
    """
    one_of("kl", kl, tuple(KL_ESTIMATORS))
    _check_mask(completion_mask)
    for name, x in (("logps", logps), ("ref_logps", ref_logps)):
        checks.tensor(name, x, tuple(completion_mask.shape), completion_mask, checks.FLOATS)
    x = ref_logps.detach().float() - logps.detach().float()
    value, _ = torch_twin(KL_ESTIMATORS[kl].fn)(x)
    return value.where(completion_mask, 0.0)


def token_rewards(rewards: Tensor, completion_mask: Tensor) -> Tensor:
    """Return (B, T) fp32 with each reward at its completion's last unmasked token, 0 elsewhere.

    Args:
        rewards: (B,) fp32; NaN stays NaN.
        completion_mask: (B, T) bool. The reward of a completion without any token is dropped.

    Raises:
        ValueError: for a wrong shape or dtype.
    """
    _check_mask(completion_mask)
    check_rewards("rewards", rewards, (len(completion_mask),), completion_mask)
    return rewards.detach()[:, None].where(_last_token(completion_mask), 0.0)


def length_penalty(
    rewards: Tensor,  # (B,)
    lengths: Tensor,  # (B,)
    group_ids_or_size: int | Tensor,  # G, or (B,) int64
    *,
    weight: float = 0.25,
) -> Tensor:
    """Return rewards - weight * mean * length / longest, (B,) fp32.

    mean and longest are those of the scored completions of the group. The more often a prompt is
    solved, the more brevity counts. It is meant for rewards >= 0. This is the part of prime-rl's
    penalty that depends on the completions alone (its `num_output_tokens_weight`, 0.25).

    Args:
        rewards: (B,) fp32; NaN (not scored) stays NaN.
        lengths: (B,) int or fp32, tokens of each completion.
        group_ids_or_size: as in `group_advantages`.
        weight: the share of the mean that the longest completion loses, >= 0.

    Raises:
        ValueError: for a wrong shape, dtype or value.
    """
    checks.tensor("rewards", rewards)
    check_rewards("rewards", rewards, (rewards.numel(),))
    check_lengths(lengths, tuple(rewards.shape), rewards)
    if finite("weight", weight) < 0:
        raise ValueError(f"weight: expected a number >= 0, got {weight}")

    def penalised(kernels: Kernels) -> Tensor:
        groups = Groups(group_ids_or_size, rewards, kernels)
        r, length = groups.sort(rewards.detach()), groups.sort(lengths.detach().float())
        longest = groups.stats(length.where(~r.isnan(), torch.nan)).high
        penalty = weight * groups.stats(r).mean * (length / longest.clamp(min=1))
        return groups.restore(r - penalty)

    return choice.run(penalised, "auto", rewards)


def soft_overlong_punishment(
    lengths: Tensor, *, max_completion_length: int, cache_length: int
) -> Tensor:
    """Return what to add to the rewards of overlong completions, (B,) fp32 in [-1, 0].

    It is 0 up to max_completion_length - cache_length tokens, falls linearly to -1 at
    max_completion_length, and is -1 beyond (DAPO, arXiv 2503.14476, equation 13).

    Args:
        lengths: (B,) int or fp32, tokens of each completion.
        max_completion_length: length at which the full punishment is reached.
        cache_length: width of the interval in which it grows, in [1, max_completion_length].

    Raises:
        ValueError: for a wrong shape, dtype or value.
    """
    checks.tensor("lengths", lengths)
    check_lengths(lengths, (lengths.numel(),))
    for name, value in (
        ("max_completion_length", max_completion_length),
        ("cache_length", cache_length),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
    if cache_length > max_completion_length:
        raise ValueError(
            f"cache_length: expected at most max_completion_length = {max_completion_length}, got "
            f"{cache_length}"
        )
    left = max_completion_length - cache_length - lengths.detach()
    return (left.float() / cache_length).clamp(-1, 0)


def mask_truncated_completions(
    completion_mask: Tensor,  # (B, T) bool
    completion_ids: Tensor,  # (B, T) int64
    eos_token_ids: int | Sequence[int],
) -> Tensor:
    """Return completion_mask with truncated completions fully masked, (B, T) bool.

    A completion is truncated unless its last unmasked token is an end-of-sequence token (TRL's
    `mask_truncated_completions`). The reward of a truncated completion still counts in its group;
    set it to NaN to leave it out there too. Where tool results can come last, pass the mask that
    includes them, and combine the result by `&` with the mask that does not.

    Args:
        completion_mask: (B, T) bool.
        completion_ids: (B, T) int64; anything at masked tokens.
        eos_token_ids: the id that ends a sequence, or several.

    Raises:
        ValueError: for a wrong shape, dtype or value.
    """
    _check_mask(completion_mask)
    checks.tensor(
        "completion_ids",
        completion_ids,
        tuple(completion_mask.shape),
        completion_mask,
        (torch.int64,),
    )
    ids = [eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids
    several = isinstance(ids, Sequence) and len(ids) > 0 and not isinstance(ids, str)
    if not several or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"eos_token_ids: expected an id or several, got {eos_token_ids!r}")
    ends = sum(completion_ids == i for i in ids) > 0
    return completion_mask & (ends & _last_token(completion_mask)).any(1, keepdim=True)


def _last_token(completion_mask: Tensor) -> Tensor:
    """Return a mask of the last unmasked token of each completion, (B, T) bool."""
    behind = completion_mask.flip(1).cumsum(1).flip(1)
    return completion_mask & (behind == 1)


def _check_mask(completion_mask: Tensor) -> None:
    checks.tensor("completion_mask", completion_mask, dtypes=(torch.bool,))
    if completion_mask.dim() != 2:
        raise ValueError(
            f"completion_mask: expected shape (B, T), got {tuple(completion_mask.shape)}"
        )
