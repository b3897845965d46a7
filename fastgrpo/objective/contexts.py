"""What some surrogates must know beyond their token: constants found over a sequence or the batch.

Each rule gives a token one number, which has no gradient. The batch is what one call is given: no
rule looks at other ranks or micro-batches. `fastgrpo_kernels.surrogates.CONTEXT_FIELDS` lists the
fields that each rule reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.objective.config import LossConfig
from fastgrpo.objective.segments import Segments


class Population(NamedTuple):
    """The packed rows (n,) of a call."""

    logps: Tensor
    log_ratio: Tensor  # of each token
    advantages: Tensor
    correction: Tensor | None  # weights of the sampler correction
    segments: Segments
    seed: int | None


def drawn_covariance(config: LossConfig, rows: Population) -> Tensor:
    """0 on a random share of the tokens with cov_low < covariance < cov_high, else 1 (Clip-Cov).

    Tokens that are clipped anyway are not drawn; `seed` makes the draw repeatable.
    """
    ratio = rows.log_ratio.clamp(max=80).exp()
    bounded = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
    covariance = _covariance(rows)
    eligible = (covariance > config.cov_low) & (covariance < config.cov_high)
    eligible &= ratio * rows.advantages <= bounded * rows.advantages
    generator = None
    if rows.seed is not None:
        generator = torch.Generator(ratio.device).manual_seed(rows.seed)
    order = torch.rand(ratio.shape, generator=generator, dtype=ratio.dtype, device=ratio.device)
    return 1.0 - _highest(order.masked_fill(~eligible, -1.0), config.cov_ratio) * eligible


def top_covariance(config: LossConfig, rows: Population) -> Tensor:
    """1 on the share of tokens with the highest covariance, else 0 (KL-Cov)."""
    return _highest(_covariance(rows), config.cov_ratio)


def future_ratio(config: LossConfig, rows: Population) -> Tensor:
    """clip(exp(sum over u >= t of gamma^(u - t) log_ratio_u)): how later tokens moved (FIPO).

    gamma = 2^(-1 / fipo_half_life). Where `delta` is set, tokens whose ratio exceeds it leave the
    sum (as in ms-swift).
    """
    ratio = rows.log_ratio.clamp(max=80).exp()
    moved = rows.log_ratio
    if config.delta is not None:
        moved = moved.masked_fill(ratio > config.delta, 0.0)
    future = discounted_sum(moved, rows.segments.cu_seqlens, 2 ** (-1 / config.fipo_half_life))
    influence = future.clamp(max=80).exp().clamp(config.fipo_low, config.fipo_high)
    if config.fipo_safety_ratio is None:
        return influence
    risky = (rows.advantages < 0) & (ratio > config.fipo_safety_ratio)
    return torch.where(risky, influence.clamp(0.8, 1.0), influence)


def log_weight(config: LossConfig, rows: Population) -> Tensor:
    """The sequence's sum of log-ratios and of log-corrections, these in [ln 1e-8, 20] (VESPO)."""
    log_w = rows.log_ratio
    if rows.correction is not None:
        # log 0 of a token that IcePop dropped is -inf: the bound.
        log_w = log_w + rows.correction.log().clamp(math.log(1e-8), 20.0)
    return rows.segments.sum(log_w)


CONTEXTS: dict[str, Callable[[LossConfig, Population], Tensor]] = {
    rule.__name__: rule for rule in (drawn_covariance, top_covariance, future_ratio, log_weight)
}


def discounted_sum(x: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    """Return sum over u >= t of gamma^(u - t) x_u within each segment of x (n,), by doubling."""
    n = len(x)
    ends = torch.repeat_interleave(cu_seqlens[1:], cu_seqlens.diff(), output_size=n)
    positions = torch.arange(n, device=x.device)
    step = 1
    while step < n:
        later = torch.nn.functional.pad(x[step:], (0, step))
        x = x + gamma**step * torch.where(positions + step < ends, later, 0.0)
        step *= 2
    return x


def _covariance(rows: Population) -> Tensor:
    """Each token's term of the covariance of advantage and log-prob."""
    n = max(len(rows.logps), 1)
    advantages = rows.advantages - rows.advantages.sum() / n
    return advantages * (rows.logps - rows.logps.sum() / n)


def _highest(x: Tensor, share: float) -> Tensor:
    """1 on the share of highest values of x (n,), at least one; else 0."""
    chosen = torch.zeros_like(x)
    if len(x):
        chosen[x.topk(max(1, int(share * len(x)))).indices] = 1.0
    return chosen
