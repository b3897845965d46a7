"""Groups of completions: checks, sorting, and the statistics of each group."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import checks
from fastgrpo.backend import Kernels
from fastgrpo_kernels import GroupStats

LARGEST_REWARD = 1e15  # squares of a million of them stay far below fp32's 3e38


def check_rewards(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor | None = None) -> None:
    """Raise ValueError unless x is fp32 of this shape, NaN or with squares that fp32 can add up."""
    checks.tensor(name, x, shape, like, (torch.float32,))
    if not checks.looks_at_values(x):
        return
    if bool(x.isinf().any()):
        raise ValueError(f"{name}: expected finite numbers, or NaN for unscored; got inf")
    if bool((x.abs() > LARGEST_REWARD).any()):
        largest = x.nan_to_num(0.0).abs().max().item()
        raise ValueError(
            f"{name}: expected numbers of at most {LARGEST_REWARD:.0e} in magnitude, got "
            f"{largest:.3g}"
        )


def check_lengths(lengths: Tensor, shape: tuple[int, ...], like: Tensor | None = None) -> None:
    """Raise ValueError unless lengths are numbers >= 0 of this shape."""
    checks.tensor("lengths", lengths, shape, like, (torch.int64, torch.int32, torch.float32))
    if checks.looks_at_values(lengths) and not bool(((lengths >= 0) & lengths.isfinite()).all()):
        raise ValueError(f"lengths: expected finite numbers >= 0, got {lengths.tolist()}")


def check_ddof(ddof: object) -> None:
    """Raise ValueError unless ddof is 0 or 1."""
    if ddof not in (0, 1) or isinstance(ddof, bool):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof!r}")


class Groups:
    """Sorts rows by group, and restores their order."""

    bounds: Tensor
    """(P + 1,) int64: where each group begins, and the end of the last."""

    def __init__(self, group_ids_or_size: int | Tensor, rewards: Tensor, kernels: Kernels) -> None:
        rows = len(rewards)
        self._kernels, self._order = kernels, None
        if isinstance(group_ids_or_size, Tensor):
            ids = group_ids_or_size
            checks.tensor("group_ids_or_size", ids, (rows,), rewards, (torch.int64,))
            ids, self._order = ids.sort(stable=True)
            sizes = torch.unique_consecutive(ids, return_counts=True)[1]
            self.bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
            return
        size = group_ids_or_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or rows % size:
            raise ValueError(
                f"group_ids_or_size: expected a divisor of the {rows} rewards, or a tensor of "
                f"ids; got {size!r}"
            )
        self.bounds = torch.arange(0, rows + 1, size, device=rewards.device)

    def sort(self, x: Tensor) -> Tensor:
        """Return x (B, ...) with the rows of each group adjacent."""
        return x if self._order is None else x[self._order]

    def restore(self, x: Tensor) -> Tensor:
        """Return sorted x (B,) in the caller's order."""
        return x if self._order is None else torch.empty_like(x).scatter_(0, self._order, x)

    def stats(
        self, rewards: Tensor, weights: Tensor | None = None, leave_one_out: bool = False
    ) -> GroupStats:
        """Return the statistics of sorted rewards (B,), weighted by sorted weights (B,)."""
        rewards = rewards.contiguous()
        return self._kernels.group_stats(rewards, self.bounds, weights, leave_one_out)

    def live(self, x: Tensor) -> Tensor:
        """Return the number of groups in which sorted x (B,) is not all 0, () int64."""
        nonzero = torch.nn.functional.pad((x != 0).cumsum(0), (1, 0))
        return (nonzero[self.bounds].diff() > 0).sum()
