"""Per-token policy loss with its derivatives and metrics, and reductions over packed segments."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .kl_estimators import KL_ESTIMATORS, KL_GRADIENTS, k3
from .runtime import architecture, jit, launch, launch_for, tl
from .surrogates import SURROGATES
from .twins import bounded_exp, clip

STATS = ("kl", "ratio", "clip_low", "clip_high", "ratio_min", "ratio_max")
SEGMENT_OPS = ("sum", "max")


class TokenObjective(NamedTuple):
    """Configuration of a token's loss: multiplier * surrogate + beta * KL."""

    surrogate: str  # a key of SURROGATES
    parameters: tuple[float, ...]  # as Surrogate.parameters
    kl: str = "k3"  # a key of KL_ESTIMATORS
    kl_gradient: str = "value"  # a key of KL_GRADIENTS
    beta: float = 0.0
    kl_input_clamp: float = math.inf
    kl_output_clamp: float = math.inf


class Tokens(NamedTuple):
    """The inputs of each token's loss, (n,) each; log-probs in nats."""

    logps: Tensor
    log_ratio: Tensor  # at the surrogate's ratio level
    advantages: Tensor
    weights: Tensor  # the token's factor in the aggregated loss
    multipliers: Tensor | None = None  # constant factors of the policy loss alone, None = 1
    context: Tensor | None = None  # the constant that the surrogate's rule computed, None = 0
    ref_logps: Tensor | None = None  # None: no KL


class TokenTerms(NamedTuple):
    """The loss of each token, its derivatives, and sums for the metrics."""

    loss: Tensor  # (n,) weights * (multipliers * L + beta * kl)
    dlogps: Tensor  # (n,) its derivative with respect to logp
    dratio: Tensor | None  # (n,) its derivative with respect to log_ratio; None: added to dlogps
    stats: Tensor  # (6,) fp64 STATS: sums over the tokens; the last two are extrema


@jit
def token_terms(
    logp,
    log_ratio,
    advantage,
    context,
    parameters,
    multiplier,
    x,  # ref_logp - logp
    beta,
    kl_input_clamp,
    kl_output_clamp,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    SLOPE_OF_RATIO: tl.constexpr,
    PENALTY: tl.constexpr,
):
    """multiplier L + beta kl of one token: (value, dvalue/dlogp, dvalue/dlog_ratio, clipped)."""
    loss, slope, clipped = SURROGATE(logp, log_ratio, advantage, context, *parameters)
    clipped = tl.where(advantage == 0.0, 0.0, clipped)
    loss = loss * multiplier
    slope = slope * multiplier
    if SLOPE_OF_RATIO:
        dratio = slope
        dlogp = slope * 0.0
    else:
        dratio = slope * 0.0
        dlogp = slope
    if PENALTY:
        bounded = clip(x, -kl_input_clamp, kl_input_clamp)
        value, slope = KL(bounded)
        slope = tl.where(bounded == x, slope, 0.0)
        kept = clip(value, -kl_output_clamp, kl_output_clamp)
        slope = tl.where(kept == value, slope, 0.0)
        value, direct, by_ratio = KL_GRADIENT(x, kept, slope, bounded_exp(log_ratio))
        loss += beta * value
        dlogp += beta * direct
        dratio += beta * by_ratio
    return loss, dlogp, dratio, clipped


@jit
def _token_loss_kernel(
    # inputs, (N,) fp32; those marked may be None
    logps_ptr,
    log_ratio_ptr,
    advantages_ptr,
    weights_ptr,
    multipliers_ptr,  # None: 1
    context_ptr,  # None: 0
    ref_logps_ptr,  # None: no KL
    # outputs: (N,) fp32 and (blocks, 6) fp32
    loss_ptr,
    dlogps_ptr,
    dratio_ptr,  # None: dlog_ratio/dlogp is 1, and the sum of both derivatives goes to dlogps
    stats_ptr,
    # sizes and scalars
    N,
    parameters,  # tuple of fp32
    beta,
    kl_input_clamp,
    kl_output_clamp,
    # the variant, and sizes
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    SLOPE_OF_RATIO: tl.constexpr,
    PENALTY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """weights * `token_terms`; a block's metric sums are one row of `stats`."""
    block = tl.program_id(0)
    offs = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs < N
    logp = tl.load(logps_ptr + offs, mask=inside, other=0.0)
    log_ratio = tl.load(log_ratio_ptr + offs, mask=inside, other=0.0)
    advantage = tl.load(advantages_ptr + offs, mask=inside, other=0.0)
    weight = tl.load(weights_ptr + offs, mask=inside, other=0.0)
    multiplier = tl.full([BLOCK_N], 1.0, tl.float32)
    if multipliers_ptr is not None:
        multiplier = tl.load(multipliers_ptr + offs, mask=inside, other=0.0)
    context = tl.zeros([BLOCK_N], tl.float32)
    if context_ptr is not None:
        context = tl.load(context_ptr + offs, mask=inside, other=0.0)
    x = tl.zeros([BLOCK_N], tl.float32)
    if ref_logps_ptr is not None:
        x = tl.load(ref_logps_ptr + offs, mask=inside, other=0.0) - logp

    loss, dlogp, dratio, clipped = token_terms(
        logp,
        log_ratio,
        advantage,
        context,
        parameters,
        multiplier,
        x,
        beta,
        kl_input_clamp,
        kl_output_clamp,
        SURROGATE,
        KL,
        KL_GRADIENT,
        SLOPE_OF_RATIO,
        PENALTY,
    )
    tl.store(loss_ptr + offs, weight * loss, mask=inside)
    if dratio_ptr is not None:
        tl.store(dratio_ptr + offs, weight * dratio, mask=inside)
    else:
        dlogp += dratio
    tl.store(dlogps_ptr + offs, weight * dlogp, mask=inside)

    ratio = bounded_exp(log_ratio)
    kl, _ = k3(x)
    stats_ptr += block * 6
    tl.store(stats_ptr + 0, tl.sum(tl.where(inside, kl, 0.0)))
    tl.store(stats_ptr + 1, tl.sum(tl.where(inside, ratio, 0.0)))
    tl.store(stats_ptr + 2, tl.sum(tl.where(inside & (clipped < 0.0), 1.0, 0.0)))
    tl.store(stats_ptr + 3, tl.sum(tl.where(inside & (clipped > 0.0), 1.0, 0.0)))
    tl.store(stats_ptr + 4, tl.min(tl.where(inside, ratio, float("inf"))))
    tl.store(stats_ptr + 5, tl.max(tl.where(inside, ratio, float("-inf"))))


def token_loss(tokens: Tokens, loss: TokenObjective, separate: bool = False) -> TokenTerms:
    """Return the weighted loss of each token with its derivatives, all fp32. Deterministic.

    With `separate` the derivatives with respect to logp and to log_ratio are returned apart.
    Without, dlog_ratio/dlogp is taken as 1, and dlogps is their sum. "kl" in stats is the k3
    estimate, 0 without ref_logps.
    """
    assert loss.beta == 0.0 or tokens.ref_logps is not None, "beta needs ref_logps"
    logps, n = tokens.logps, tokens.logps.numel()
    entry = launch_for("token_loss", 0, architecture(logps.device))
    blocks = -(-n // entry.blocks["BLOCK_N"])
    losses, dlogps = torch.empty_like(logps), torch.empty_like(logps)
    dratio = torch.empty_like(logps) if separate else None
    stats = logps.new_empty(blocks, len(STATS))
    launch(
        _token_loss_kernel,
        (blocks,),
        entry,
        logps.device,
        **{f"{name}_ptr": x for name, x in tokens._asdict().items()},
        loss_ptr=losses,
        dlogps_ptr=dlogps,
        dratio_ptr=dratio,
        stats_ptr=stats,
        N=n,
        parameters=loss.parameters,
        beta=loss.beta,
        kl_input_clamp=loss.kl_input_clamp,
        kl_output_clamp=loss.kl_output_clamp,
        SURROGATE=SURROGATES[loss.surrogate].fn,
        KL=KL_ESTIMATORS[loss.kl].fn,
        KL_GRADIENT=KL_GRADIENTS[loss.kl_gradient].fn,
        SLOPE_OF_RATIO=SURROGATES[loss.surrogate].slope == "ratio",
        PENALTY=loss.beta != 0.0,
    )
    return TokenTerms(losses, dlogps, dratio, merge_blocks(stats))


def merge_blocks(stats: Tensor) -> Tensor:
    """Merge the STATS of several blocks of tokens (blocks, 6) into one (6,) fp64.

    A ratio is at most e^80: 6,000 of them are more than fp32 holds.
    """
    stats = stats.double()
    if not len(stats):
        return stats.new_zeros(len(STATS))
    low, high = stats[:, -2].amin(0, keepdim=True), stats[:, -1].amax(0, keepdim=True)
    return torch.cat([stats[:, :-2].sum(0), low, high])


@jit
def _segment_reduce_kernel(x_ptr, cu_seqlens_ptr, out_ptr, OP: tl.constexpr, BLOCK_N: tl.constexpr):
    """One segment: one pass reduces it, another writes the result to each of its rows."""
    segment = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + segment).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + segment + 1).to(tl.int64)
    if OP == "max":
        total = tl.full([BLOCK_N], float("-inf"), tl.float32)
    else:
        total = tl.zeros([BLOCK_N], tl.float32)
    for block in range(start, end, BLOCK_N):
        offs = block + tl.arange(0, BLOCK_N)
        if OP == "max":
            x = tl.load(x_ptr + offs, mask=offs < end, other=float("-inf"))
            total = tl.where(x > total, x, total)
        else:
            total += tl.load(x_ptr + offs, mask=offs < end, other=0.0)
    if OP == "max":
        result = tl.max(total)
    else:
        result = tl.sum(total)
    for block in range(start, end, BLOCK_N):
        offs = block + tl.arange(0, BLOCK_N)
        tl.store(out_ptr + offs, tl.zeros([BLOCK_N], tl.float32) + result, mask=offs < end)


def segment_reduce(
    x: Tensor,  # (n,) fp32
    cu_seqlens: Tensor,  # (B + 1,) int32 or int64, from 0 to n
    op: str,  # one of SEGMENT_OPS
) -> Tensor:
    """Return the sum or max of x over each segment, broadcast to the segment's rows, (n,).

    Segments may be empty. Deterministic.
    """
    out = torch.empty_like(x)
    segments = cu_seqlens.numel() - 1
    entry = launch_for("segment_reduce", 0, architecture(x.device))
    launch(
        _segment_reduce_kernel,
        (segments,),
        entry,
        x.device,
        x_ptr=x,
        cu_seqlens_ptr=cu_seqlens,
        out_ptr=out,
        OP=op,
    )
    return out
