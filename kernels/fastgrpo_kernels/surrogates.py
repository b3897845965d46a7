"""Policy-gradient surrogates and KL estimators: one entry per variant, value and derivative.

Each variant is written once. `fn` runs inside the Triton kernel and, through `torch_twin`, on torch
tensors: its only global is `tl`, and it uses names that Triton and torch share. `formula` is the
same loss as its paper writes it, for autograd: the oracle of the hand-written derivative.

Exponents stop at 80 (`exp(80)` is 5e34), so that a ratio never becomes inf and `0 * inf` never
arises; beyond that point value and derivative both stay where they were.
"""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .runtime import jit, tl


class Surrogate(NamedTuple):
    """A per-token policy loss L.

    fn(logp, log_ratio, advantage, epsilon_low, epsilon_high, delta) -> (L, dL/dlogp), where
    dlog_ratio/dlogp is 1; formula(same arguments) -> L, differentiable.
    """

    fn: Callable
    formula: Callable[..., Tensor]
    ratio_levels: tuple[str, ...]  # values of `ratio_level` that the variant is defined for
    uses: tuple[str, ...]  # the bounds it reads; any other one set by the user is an error


class KLEstimator(NamedTuple):
    """A per-token estimate of KL(policy || reference) from x = ref_logp - logp.

    fn(x) -> (value, dvalue/dlogp); formula(x) -> value, differentiable.
    """

    fn: Callable
    formula: Callable[[Tensor], Tensor]


def torch_twin(fn: Callable) -> Callable:
    """The same source as `fn`, computing on torch tensors (any floating dtype)."""
    source = getattr(fn, "fn", fn)
    return types.FunctionType(
        source.__code__, {"tl": torch, "__builtins__": builtins}, source.__name__
    )


def _exp(x: Tensor) -> Tensor:
    """exp(x), saturating at x = 80 in value and in derivative."""
    return torch.exp(x - (x.detach() - 80).clamp(min=0))


@jit
def ppo_clip(logp, log_ratio, advantage, epsilon_low, epsilon_high, delta):
    """-min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), r = exp(log_ratio).

    Schulman et al. 2017 (arXiv 1707.06347); delta, 0 for none, bounds r where A < 0 as well
    (INTELLECT-2, arXiv 2505.07291). The gradient is kept where the value chosen equals r.
    """
    ratio = tl.exp(tl.where(log_ratio > 80.0, 80.0, log_ratio))
    bounded = tl.where((delta > 0.0) & (ratio > delta), delta, ratio)
    clipped = tl.where(ratio < 1.0 - epsilon_low, 1.0 - epsilon_low, ratio)
    clipped = tl.where(ratio > 1.0 + epsilon_high, 1.0 + epsilon_high, clipped)
    chosen = tl.where(bounded * advantage <= clipped * advantage, bounded, clipped)
    return -chosen * advantage, tl.where(chosen == ratio, -ratio * advantage, 0.0)


def ppo_clip_formula(logp, log_ratio, advantage, epsilon_low, epsilon_high, delta) -> Tensor:
    """The clipped objective with its second bound, as printed."""
    ratio = _exp(log_ratio)
    bounded = ratio.clamp(max=delta) if delta > 0 else ratio
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(bounded * advantage, clipped * advantage)


@jit
def cispo(logp, log_ratio, advantage, epsilon_low, epsilon_high, delta):
    """-sg(clip(r, 1 - epsilon_low, 1 + epsilon_high)) A logp: every token keeps its gradient.

    MiniMax-M1 (arXiv 2506.13585). Bounds are offsets from 1; TRL's `epsilon_high` is 1 + ours.
    """
    ratio = tl.exp(tl.where(log_ratio > 80.0, 80.0, log_ratio))
    weight = tl.where(ratio < 1.0 - epsilon_low, 1.0 - epsilon_low, ratio)
    weight = tl.where(ratio > 1.0 + epsilon_high, 1.0 + epsilon_high, weight)
    return -weight * advantage * logp, -weight * advantage


def cispo_formula(logp, log_ratio, advantage, epsilon_low, epsilon_high, delta) -> Tensor:
    """The truncated importance weight is a constant of the gradient."""
    weight = _exp(log_ratio).clamp(1 - epsilon_low, 1 + epsilon_high)
    return -weight.detach() * advantage * logp


@jit
def reinforce(logp, log_ratio, advantage, epsilon_low, epsilon_high, delta):
    """-A logp (Williams 1992). The ratio is not used."""
    return -advantage * logp, -advantage


def reinforce_formula(logp, log_ratio, advantage, epsilon_low, epsilon_high, delta) -> Tensor:
    """The score-function estimator."""
    return -advantage * logp


@jit
def k3(x):
    """exp(x) - x - 1, x = ref_logp - logp: unbiased, never negative (Schulman 2020, "k3").

    Its derivative in logp is 1 - exp(x). Both lose every digit to cancellation near x = 0, where
    policies are: there, the first terms of the series.
    """
    x = tl.where(x > 80.0, 80.0, x)
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    small = x * x * (0.5 + x * (1 / 6 + x * series))
    value = tl.where(tl.abs(x) < 0.25, small, tl.exp(x) - x - 1.0)
    return value, -(x + value)


def k3_formula(x: Tensor) -> Tensor:
    """Schulman's low-variance estimator."""
    return _exp(x) - x - 1


SURROGATES: dict[str, Surrogate] = {
    "ppo_clip": Surrogate(
        ppo_clip,
        ppo_clip_formula,
        ratio_levels=("token", "sequence"),
        uses=("epsilon_low", "epsilon_high", "delta"),
    ),
    # The weighted logp is a token's own: there is no sequence form.
    "cispo": Surrogate(
        cispo, cispo_formula, ratio_levels=("token",), uses=("epsilon_low", "epsilon_high")
    ),
    "reinforce": Surrogate(reinforce, reinforce_formula, ratio_levels=("none",), uses=()),
}

KL_ESTIMATORS: dict[str, KLEstimator] = {"k3": KLEstimator(k3, k3_formula)}
