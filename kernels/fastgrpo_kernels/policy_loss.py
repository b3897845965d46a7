"""Per-token policy loss with its derivatives and metrics, and the means of packed segments."""

from __future__ import annotations

import torch
from torch import Tensor

from .runtime import architecture, device_of, jit, launch_for, tl
from .surrogates import KL_ESTIMATORS, SURROGATES, k3

STATS = ("kl", "ratio", "clip_low", "clip_high", "approx_kl")


@jit
def _token_loss_kernel(
    # inputs, (N,) fp32
    logps_ptr,
    log_ratio_ptr,
    ref_logps_ptr,  # or None
    advantages_ptr,
    weights_ptr,
    # outputs: (N,) fp32 and (blocks, 5) fp32
    loss_ptr,
    dpolicy_ptr,
    dkl_ptr,  # or None: beta is 0
    stats_ptr,
    # sizes and scalars
    N,
    epsilon_low,
    epsilon_high,
    delta,
    beta,
    # the variant, and sizes
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """weights (L + beta kl) and both derivatives; a block's metric sums are one row of `stats`."""
    block = tl.program_id(0)
    offs = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs < N
    logp = tl.load(logps_ptr + offs, mask=inside, other=0.0)
    log_ratio = tl.load(log_ratio_ptr + offs, mask=inside, other=0.0)
    advantage = tl.load(advantages_ptr + offs, mask=inside, other=0.0)
    weight = tl.load(weights_ptr + offs, mask=inside, other=0.0)

    loss, dpolicy = SURROGATE(logp, log_ratio, advantage, epsilon_low, epsilon_high, delta)
    kl = tl.zeros_like(logp)
    if ref_logps_ptr is not None:
        ref_logp = tl.load(ref_logps_ptr + offs, mask=inside, other=0.0)
        kl, _ = k3(ref_logp - logp)
        if dkl_ptr is not None:
            penalty, dpenalty = KL(ref_logp - logp)
            loss += beta * penalty
            tl.store(dkl_ptr + offs, weight * beta * dpenalty, mask=inside)
    tl.store(loss_ptr + offs, weight * loss, mask=inside)
    tl.store(dpolicy_ptr + offs, weight * dpolicy, mask=inside)

    ratio = tl.exp(tl.where(log_ratio > 80.0, 80.0, log_ratio))
    clip_low = (ratio < 1.0 - epsilon_low) & (advantage < 0.0)
    clip_high = (ratio > 1.0 + epsilon_high) & (advantage > 0.0)
    approx_kl, _ = k3(log_ratio)  # (r - 1) - log r
    stats_ptr += block * 5
    tl.store(stats_ptr + 0, tl.sum(tl.where(inside, kl, 0.0)))
    tl.store(stats_ptr + 1, tl.sum(tl.where(inside, ratio, 0.0)))
    tl.store(stats_ptr + 2, tl.sum(tl.where(inside & clip_low, 1.0, 0.0)))
    tl.store(stats_ptr + 3, tl.sum(tl.where(inside & clip_high, 1.0, 0.0)))
    tl.store(stats_ptr + 4, tl.sum(tl.where(inside, approx_kl, 0.0)))


def token_loss(
    logps: Tensor,  # (n,) fp32, nats, like every tensor below
    log_ratio: Tensor,  # logp - old_logp, or its mean over the row's sequence
    ref_logps: Tensor | None,
    advantages: Tensor,
    weights: Tensor,  # the row's factor in the aggregated loss
    surrogate: str,  # a key of SURROGATES
    kl: str,  # a key of KL_ESTIMATORS
    epsilon_low: float,
    epsilon_high: float,
    delta: float,  # 0.0: no second bound
    beta: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the loss of each row, its derivatives in logp, and the sums that metrics are made of.

    loss (n,) = weights * (L + beta * kl); dpolicy (n,) = weights * dL/dlogp; dkl (n,) = weights *
    beta * dkl/dlogp, None where beta is 0; stats (5,) are sums over the rows, named by STATS ("kl"
    is the k3 estimate, 0 without ref_logps). Deterministic.
    """
    assert beta == 0.0 or ref_logps is not None, "beta needs ref_logps"
    n = logps.numel()
    launch = launch_for("token_loss", 0, architecture(logps.device))
    blocks = -(-n // launch.blocks["BLOCK_N"])
    loss, dpolicy = torch.empty_like(logps), torch.empty_like(logps)
    dkl = torch.empty_like(logps) if beta != 0.0 else None
    stats = logps.new_empty(blocks, len(STATS))
    with device_of(logps):
        if n:
            _token_loss_kernel[(blocks,)](
                *(logps, log_ratio, ref_logps, advantages, weights),
                *(loss, dpolicy, dkl, stats),
                *(n, epsilon_low, epsilon_high, delta, beta),
                SURROGATE=SURROGATES[surrogate].fn,
                KL=KL_ESTIMATORS[kl].fn,
                **launch.kwargs(),
            )
    return loss, dpolicy, dkl, stats.sum(0)


@jit
def _segment_mean_kernel(x_ptr, cu_seqlens_ptr, out_ptr, BLOCK_N: tl.constexpr):
    """One segment: its sum in one pass, its mean to every row in another."""
    segment = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + segment).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + segment + 1).to(tl.int64)
    total = tl.zeros([BLOCK_N], tl.float32)
    for block in range(start, end, BLOCK_N):
        offs = block + tl.arange(0, BLOCK_N)
        total += tl.load(x_ptr + offs, mask=offs < end, other=0.0)
    mean = tl.sum(total) / (end - start).to(tl.float32)
    for block in range(start, end, BLOCK_N):
        offs = block + tl.arange(0, BLOCK_N)
        tl.store(out_ptr + offs, tl.zeros([BLOCK_N], tl.float32) + mean, mask=offs < end)


def segment_mean(
    x: Tensor,  # (n,) fp32
    cu_seqlens: Tensor,  # (B + 1,) int32 or int64, from 0 to n
) -> Tensor:
    """Return the mean of x over each segment, broadcast to the segment's rows, (n,) fp32.

    Segments may be empty.
    """
    out = torch.empty_like(x)
    segments = cu_seqlens.numel() - 1
    launch = launch_for("segment_mean", 0, architecture(x.device))
    with device_of(x):
        if segments:
            _segment_mean_kernel[(segments,)](x, cu_seqlens, out, **launch.kwargs())
    return out
