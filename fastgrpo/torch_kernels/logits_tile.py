"""Passes over one tile of logits that a GEMM has written: statistics, gradient, target rows.

Tiles may have any strides; float64 is supported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.torch_kernels.logit_math import logit_slope, scaled_logits, targets
from fastgrpo_kernels import RowState


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
    z = scaled_logits(z, bias, inv_temperature, logit_scale, softcap)
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
    slope = logit_slope(inv_temperature, logit_scale, z)
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
    slope = logit_slope(inv_temperature, logit_scale, dlogps)
    upstream = dlogps if slope is None else dlogps * slope[..., 0]
    log_scale = anchor - lse
    rows, columns = targets(ids, vocab_start, e.shape[1])
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
    rows, columns = targets(ids, vocab_start, z.shape[1])
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
    slope = logit_slope(inv_temperature, logit_scale, z)
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
    inside, columns = targets(sorted_ids, vocab_start, acc.shape[0])
    source = order[inside]
    acc.index_add_(0, columns, coef[source, None] * rows[source].to(acc.dtype))


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
    rows, columns = targets(ids, vocab_start, z.shape[1])
    state.target[rows] = z[rows, columns]
    return anchor, moved
