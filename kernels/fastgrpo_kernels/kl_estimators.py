"""Estimates of KL(policy || reference) from a sampled token, and what is differentiated in them.

x = ref_logp - logp. As in `surrogates`, one source serves Triton and torch, and `formula` is the
definition that autograd differentiates. The gradient of k1 itself has mean 0, and that of k3 is
biased (arXiv 2506.09477). So a second table chooses what is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .runtime import jit, tl
from .twins import outside


class KLEstimator(NamedTuple):
    """fn(x) -> (value, dvalue/dlogp); formula(x) -> value, differentiable."""

    fn: Callable
    formula: Callable[[Tensor], Tensor]


class KLGradient(NamedTuple):
    """What is differentiated, given an estimate.

    fn(x, value, slope, ratio) -> (value, dvalue/dlogp, dvalue/dlog_ratio);
    formula(x, logp, value, ratio) -> value, differentiable.
    """

    fn: Callable
    formula: Callable[..., Tensor]


@jit
def k1(x):
    """-x: unbiased, of either sign."""
    return -x, x * 0.0 + 1.0


@jit
def k2(x):
    """x^2 / 2: biased, with the right gradient on-policy (verl's "mse")."""
    return 0.5 * x * x, -x


@jit
def k3(x):
    """exp(x) - x - 1: unbiased, never negative (Schulman 2020; verl's "low_var_kl").

    Its derivative with respect to logp is 1 - exp(x). Near x = 0, where most tokens are, both would
    lose their digits to cancellation: there the first terms of the series are used. Above x = 80 it
    is constant.
    """
    x = tl.where(x > 80.0, 80.0, x)
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    small = x * x * (0.5 + x * (1 / 6 + x * series))
    value = tl.where(tl.abs(x) < 0.25, small, tl.exp(x) - x - 1.0)
    return value, -(x + value)


@jit
def absolute(x):
    """|x| (verl's "abs")."""
    sign = outside(x, 0.0, 0.0)
    return sign * x, x * 0.0 - sign


def k3_formula(x: Tensor) -> Tensor:
    return torch.exp(x - (x.detach() - 80).clamp(min=0)) - x - 1


@jit
def value_gradient(x, value, slope, ratio):
    """The gradient of the estimate itself."""
    return value, slope, value * 0.0


@jit
def straight_through(x, value, slope, ratio):
    """The value of the estimate with the gradient of k2 (verl's "k1+" and "k3+")."""
    return value, -x, value * 0.0


def straight_through_formula(x: Tensor, logp: Tensor, value: Tensor, ratio: Tensor) -> Tensor:
    k2_value = x**2 / 2
    return value.detach() + k2_value - k2_value.detach()


@jit
def importance(x, value, slope, ratio):
    """ratio * estimate, differentiated through the ratio too: unbiased off-policy (DeepSeek-V3.2,
    TRL).

    This changes the gradient even where the ratio is 1: that of r k3 is logp - ref_logp there.
    """
    return ratio * value, ratio * slope, ratio * value


def importance_formula(x: Tensor, logp: Tensor, value: Tensor, ratio: Tensor) -> Tensor:
    return ratio * value


@jit
def score_function(x, value, slope, ratio):
    """exp(logp - sg(logp)) * estimate: adds the score-function term (NeMo-RL's default).

    Where the estimate is clamped, so that its slope is 0, this term has no gradient either.
    """
    return value, tl.where(slope == 0.0, 0.0, value + slope), value * 0.0


def score_function_formula(x: Tensor, logp: Tensor, value: Tensor, ratio: Tensor) -> Tensor:
    return torch.exp(logp - logp.detach()) * value


KL_ESTIMATORS: dict[str, KLEstimator] = {
    "k1": KLEstimator(k1, lambda x: -x),
    "k2": KLEstimator(k2, lambda x: x**2 / 2),
    "k3": KLEstimator(k3, k3_formula),
    "abs": KLEstimator(absolute, torch.abs),
}

KL_GRADIENTS: dict[str, KLGradient] = {
    "value": KLGradient(value_gradient, lambda x, logp, value, ratio: value),
    "straight_through": KLGradient(straight_through, straight_through_formula),
    "importance": KLGradient(importance, importance_formula),
    "score_function": KLGradient(score_function, score_function_formula),
}
