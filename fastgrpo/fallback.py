"""Torch twins of the Triton launchers: the CPU's real implementation.

Names, signatures and results are those of `fastgrpo_kernels`; tiles may have any strides, and
float64 is supported. Whatever is vocabulary-sized is handled by the caller in tiles
(`fastgrpo.chunked`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo_kernels import STATS, RowState
from fastgrpo_kernels.surrogates import KL_ESTIMATORS, SURROGATES, torch_twin

__all__ = [
    "STATS",
    "RowState",
    "tile_stats",
    "tile_exp",
    "tile_exp_grad",
    "tile_grad",
    "scatter_rows",
    "token_loss",
    "segment_mean",
    "group_advantages",
]

ROW_MAJOR_TILES = False  # CPU GEMMs write a tile faster column by column


def tile_stats(
    z: Tensor,  # (n, Vs) fp32 | fp64 raw logits of the slice, left as they are
    ids: Tensor,  # (n,) int64
    vocab_start: int,
    bias: Tensor | None,  # (Vs,)
    inv_temperature: Tensor | None,  # (n,), None = 1
    logit_scale: float,
    softcap: float,
    state: RowState,
    with_entropy: bool,
) -> None:
    """Fold one tile of logits into the running softmax statistics of its rows."""
    z = _scaled_logits(z, bias, inv_temperature, logit_scale, softcap)
    anchor, moved = _move_maximum(z, ids, vocab_start, state)
    e = (z - anchor[:, None]).exp_()
    if with_entropy:
        # sum e*(z - max): moving the maximum by d adds d to every exponent seen so far.
        shift = torch.where(moved > -torch.inf, moved * state.sum, 0.0)
        state.dot.add_(shift).mul_(moved.exp()).sub_(torch.special.entr(e).sum(1))
    state.sum.mul_(moved.exp()).add_(e.sum(1))


def tile_exp(
    z: Tensor,  # (n, Vs) fp32 | fp64 raw logits of the slice; exp(z - anchor) afterwards
    ids: Tensor,  # (n,) int64
    vocab_start: int,
    bias: Tensor | None,  # (Vs,)
    inv_temperature: Tensor | None,  # (n,), None = 1
    logit_scale: float,
    state: RowState,
) -> Tensor:
    """Fold one tile like `tile_stats`, leave its exponentials in it and return their anchor (n,).

    Without softcap and entropy the gradient is a multiple of them: half of the work is saved.
    """
    if bias is not None:
        z.add_(bias)
    slope = _slope(inv_temperature, logit_scale)
    if slope is not None:
        z.mul_(slope)
    anchor, moved = _move_maximum(z, ids, vocab_start, state)
    state.sum.mul_(moved.exp()).add_(z.sub_(anchor[:, None]).exp_().sum(1))
    return anchor


def tile_exp_grad(
    e: Tensor,  # (n, Vs) as `tile_exp` left it; the gradient afterwards
    ids: Tensor,  # (n,) int64
    vocab_start: int,
    inv_temperature: Tensor | None,  # (n,), None = 1
    logit_scale: float,
    anchor: Tensor,  # (n,)
    lse: Tensor,  # (n,)
    dlogps: Tensor,  # (n,)
) -> None:
    """Turn exponentials into the gradient with respect to the raw logits."""
    slope = _slope(inv_temperature, logit_scale)
    upstream = dlogps if slope is None else dlogps * slope[..., 0]
    log_scale = anchor - lse
    rows, columns = _targets(ids, vocab_start, e.shape[1])
    coef = -torch.expm1(e[rows, columns].log() + log_scale[rows]) * upstream[rows]
    e.mul_((-upstream * log_scale.exp())[:, None])
    e[rows, columns] = coef


def tile_grad(
    z: Tensor,  # (n, Vs) fp32 | fp64 raw logits of the slice; overwritten
    ids: Tensor,  # (n,) int64
    vocab_start: int,
    bias: Tensor | None,  # (Vs,)
    inv_temperature: Tensor | None,  # (n,), None = 1
    logit_scale: float,
    softcap: float,
    lse: Tensor,  # (n,)
    entropy: Tensor | None,  # (n,), needed with dentropy
    dlogps: Tensor,  # (n,)
    dentropy: Tensor | None,  # (n,)
    out: Tensor,  # (n, Vs): z itself, or a bf16/fp16 buffer
    dtarget: Tensor | None,  # (n,) fp32, or None: leave the target entry in `out`
) -> None:
    """Write the gradient with respect to the raw logits of one tile to `out`."""
    plain = bias is None and inv_temperature is None and logit_scale == 1.0 and softcap == 0.0
    capped = None
    if not plain:
        scaled = z if bias is None else z.add_(bias)
        scaled = scaled.mul_(logit_scale)
        if softcap:
            capped = torch.tanh(scaled / softcap)
            scaled = softcap * capped
        z = scaled if inv_temperature is None else scaled.mul_(inv_temperature[:, None])
    rows, columns = _targets(ids, vocab_start, z.shape[1])
    log_p = z.sub_(lse[:, None])
    # The target's 1 - p, from its log-prob: accurate also where p is nearly 1.
    coef = -torch.expm1(log_p[rows, columns]) * dlogps[rows]
    if dentropy is None:
        dz = log_p.exp_().mul_(-dlogps[:, None])
    else:
        p = log_p.exp()
        log_p = log_p.masked_fill_(p == 0, 0.0).add_(entropy[:, None]).mul_(dentropy[:, None])
        coef.sub_(p[rows, columns] * log_p[rows, columns])
        dz = p.mul_(log_p.add_(dlogps[:, None]).neg_())
    slope = _slope(inv_temperature, logit_scale)
    if capped is not None:
        uncapped = 1 - capped.square()
        slope = uncapped if slope is None else uncapped.mul_(slope)
    if slope is not None:
        dz.mul_(slope)
        coef.mul_(slope.expand_as(dz)[rows, columns])
    if dtarget is None:
        dz[rows, columns] = coef
    else:
        dz[rows, columns] = 0.0
        dtarget[rows] = coef
    if out.data_ptr() != dz.data_ptr():
        out.copy_(dz)


def scatter_rows(
    acc: Tensor,  # (Vs, H) fp32 | fp64
    sorted_ids: Tensor,  # (n,) int64 ascending
    order: Tensor,  # (n,) int64: the row each sorted id came from
    coef: Tensor,  # (n,)
    rows: Tensor,  # (n, H)
    vocab_start: int,
) -> None:
    """Add coef * row to acc[id - vocab_start] for every id inside the slice."""
    inside, columns = _targets(sorted_ids, vocab_start, acc.shape[0])
    source = order[inside]
    acc.index_add_(0, columns, coef[source, None] * rows[source].to(acc.dtype))


def token_loss(
    logps: Tensor,  # (n,)
    log_ratio: Tensor,  # (n,)
    ref_logps: Tensor | None,  # (n,)
    advantages: Tensor,  # (n,)
    weights: Tensor,  # (n,)
    surrogate: str,
    kl: str,
    epsilon_low: float,
    epsilon_high: float,
    delta: float,  # 0 = off
    beta: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return weighted losses (n,), their derivatives (policy part, KL part) and `STATS`."""
    policy = torch_twin(SURROGATES[surrogate].fn)
    loss, dpolicy = policy(logps, log_ratio, advantages, epsilon_low, epsilon_high, delta)
    loss, dpolicy, dkl = loss * weights, dpolicy * weights, None
    kl_value = torch.zeros_like(logps)
    if ref_logps is not None:
        kl_value, kl_slope = torch_twin(KL_ESTIMATORS[kl].fn)(ref_logps - logps)
    if beta:
        loss = loss + weights * beta * kl_value
        dkl = weights * beta * kl_slope
    ratio = log_ratio.clamp(max=80).exp()
    clip_low = (ratio < 1 - epsilon_low) & (advantages < 0)
    clip_high = (ratio > 1 + epsilon_high) & (advantages > 0)
    stats = (kl_value, ratio, clip_low, clip_high, (ratio - 1) - log_ratio)
    return loss, dpolicy, dkl, torch.stack([s.sum(dtype=logps.dtype) for s in stats])


def segment_mean(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the mean of each segment of x (n,), broadcast to the segment's rows."""
    lengths = cu_seqlens.diff()
    segment = torch.repeat_interleave(lengths, output_size=x.shape[0])
    sums = x.new_zeros(lengths.shape[0]).index_add_(0, segment, x)
    return (sums / lengths.clamp(min=1))[segment]


def group_advantages(
    rewards: Tensor,  # (B,) fp32
    cu_groups: Tensor,  # (P + 1,)
    normalize: bool,
    ddof: int,
    eps: float,
) -> Tensor:
    """Return each reward minus its group's mean, divided by std + eps if `normalize`."""
    lengths = cu_groups.diff()
    groups = lengths.shape[0]
    group = torch.repeat_interleave(lengths, output_size=rewards.shape[0])
    scored = ~rewards.isnan()

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(groups).index_add_(0, group, x)

    count = total(scored.to(rewards.dtype))
    # Distances from the group's lowest reward: equal rewards leave no rounding behind.
    low = rewards.new_full((groups,), torch.inf)
    low.scatter_reduce_(0, group, rewards.nan_to_num(torch.inf), "amin")
    r = torch.where(scored, rewards - low[group], 0.0)
    centred = torch.where(scored, r - (total(r) / count.clamp(min=1))[group], 0.0)
    if normalize:
        variance = total(centred.square()) / (count - ddof).clamp(min=1)
        deviation = variance.sqrt() + eps
        # Without eps a constant group is 0 / 0.
        centred = torch.where(centred == 0, centred, centred / deviation[group])
    return centred


def _scaled_logits(
    z: Tensor, bias: Tensor | None, inv_temperature: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Return softcap(scale * (z + bias)) * inv_temperature; z itself when all of them are off."""
    if bias is not None:
        z = z + bias
    if scale != 1.0:
        z = z * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z if inv_temperature is None else z * inv_temperature[:, None]


def _slope(inv_temperature: Tensor | None, logit_scale: float) -> Tensor | None:
    """Return dz/dz0 without a softcap, (n or 1, 1); None for 1."""
    if inv_temperature is None:
        return None if logit_scale == 1.0 else torch.tensor([[logit_scale]])
    return inv_temperature[:, None] * logit_scale


def _move_maximum(
    z: Tensor, ids: Tensor, vocab_start: int, state: RowState
) -> tuple[Tensor, Tensor]:
    """Bring the running maximum and target of the rows up to date with a tile of logits.

    Return the anchor to subtract before exp(), and by how much the old maximum lies below it.
    """
    new_max = torch.maximum(state.max, z.amax(1))
    # A row of -inf so far has no maximum to subtract: any finite anchor keeps exp() at 0.
    anchor = new_max.masked_fill(new_max == -torch.inf, 0.0)
    moved = state.max - anchor
    state.max.copy_(new_max)
    rows, columns = _targets(ids, vocab_start, z.shape[1])
    state.target[rows] = z[rows, columns]
    return anchor, moved


def _targets(ids: Tensor, vocab_start: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the rows whose id lies in the slice, and its column there."""
    columns = ids - vocab_start
    rows = ((columns >= 0) & (columns < width)).nonzero()[:, 0]
    return rows, columns[rows]
