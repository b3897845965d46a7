"""Advantages of grouped rewards."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastgrpo import checks
from fastgrpo.backend import resolve


def group_advantages(
    rewards: Tensor,  # (B,)
    group_ids_or_size: int | Tensor,  # G, or (B,) int64
    *,
    estimator: Literal["grpo", "dr_grpo"] = "grpo",
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """Return each completion's advantage over the other completions of its prompt, (B,) fp32.

        grpo       (r - mean) / (std + eps)      Shao et al. 2024, arXiv 2402.03300
        dr_grpo    r - mean                      Liu et al. 2025, arXiv 2503.20783

    Args:
        rewards: (B,) fp32. NaN marks a completion that could not be scored: it is left out of its
            group's mean and std, and its advantage is 0.
        group_ids_or_size: the group size G, the completions of a prompt being adjacent; or (B,)
            int64 ids, in any order, for groups of any size.
        estimator: "grpo" or "dr_grpo".
        ddof: the std divides by (scored members - ddof).
        eps: added to the std.

    A constant group, and a group with one scored member, give exactly 0.

    Raises:
        ValueError: for a wrong shape, dtype or value, and for ddof or eps with "dr_grpo".
    """
    checks.tensor("rewards", rewards, dtypes=(torch.float32,))
    if rewards.dim() != 1:
        raise ValueError(f"rewards: expected shape (B,), got {tuple(rewards.shape)}")
    checks.one_of("estimator", estimator, ("grpo", "dr_grpo"))
    if estimator == "dr_grpo" and (ddof, eps) != (1, 1e-4):
        raise ValueError("ddof and eps have no effect with estimator='dr_grpo'")
    if ddof not in (0, 1):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof!r}")
    if checks.finite("eps", eps) < 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    rewards = rewards.detach()
    impl = resolve(rewards.device, "auto")
    options = (estimator == "grpo", ddof, float(eps))
    if isinstance(group_ids_or_size, Tensor):
        ids = group_ids_or_size
        checks.tensor("group_ids_or_size", ids, tuple(rewards.shape), rewards, (torch.int64,))
        _, order = ids.sort(stable=True)
        sizes = torch.unique_consecutive(ids[order], return_counts=True)[1]
        bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        result = impl.group_advantages(rewards[order], bounds, *options)
        return torch.empty_like(result).scatter_(0, order, result)
    size = group_ids_or_size
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or len(rewards) % size:
        raise ValueError(
            f"group_ids_or_size: expected a divisor of the {len(rewards)} rewards, or a tensor of "
            f"ids; got {size!r}"
        )
    bounds = torch.arange(0, len(rewards) + 1, size, device=rewards.device)
    return impl.group_advantages(rewards, bounds, *options)
