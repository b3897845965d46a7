"""Passes over one tile of logits that a GEMM has written: statistics, gradient, target rows.

Tiles may have any strides, and float64 is supported.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgrpo.torch_kernels.logit_math import logit_slope, targets, tile_logits, tile_targets
from fastgrpo.torch_kernels.sparse_entries import entry_logits
from fastgrpo_kernels import Logps, RowState, Tile, Upstream

BLOCK = 2**17  # entries of a tile that are worked on at once
LEAST_PROBABILITY = 1e-30  # of a target whose log-prob is the logarithm of its probability


def tile_stats(tile: Tile, state: RowState, with_entropy: bool) -> None:
    """Merge one tile of logits into the softmax statistics of its rows; the tile is not changed."""
    for block in _blocks(tile.z):
        _merge_stats(_rows_of(tile, block), state[block], with_entropy)


def _merge_stats(tile: Tile, state: RowState, with_entropy: bool) -> None:
    z = tile_logits(tile)
    anchor, moved = _move_maximum(z, tile, state)
    e = (z - anchor[:, None]).exp_()
    if with_entropy:
        # sum e*(z - max): moving the maximum by d adds d to every exponent seen so far.
        shift = torch.where(moved > -torch.inf, moved * state.sum, 0.0)
        state.dot.add_(shift).mul_(moved.exp()).sub_(torch.special.entr(e).sum(1))
    state.sum.mul_(moved.exp()).add_(e.sum(1))


def tile_softmax(tile: Tile, with_entropy: bool) -> tuple[Logps, Tensor]:
    """Turn a tile that holds all logits z of its rows into p; return the scores, and sums (n,).

    There is nothing left to transform: z is already scaled, and divided by the temperature. PyTorch
    adds a row's exponentials up one after the other, which loses up to 1e-5 of their sum. So p is
    not quite normalised: the probabilities are p over the row's sum, which loses nothing.
    """
    z, ids = tile.z, tile.rows.ids
    column = ids.clamp(0, z.shape[1] - 1)[:, None]
    target = z.gather(1, column)[:, 0]
    torch.softmax(z, 1, out=z)
    total = z.sum(1)
    p = (z.gather(1, column)[:, 0] / total).clamp_(max=1.0)
    logps = p.log()
    lse = target - logps
    rare = (p < LEAST_PROBABILITY).nonzero()[:, 0]
    if len(rare):  # its logarithm is inexact, or -inf: the likeliest entry tells the lse
        top = z.argmax(1, keepdim=True)[rare]
        logit = torch.empty_like(top, dtype=z.dtype)
        entry_logits(tile.rows[rare], tile.head, top.to(torch.int32), None, logit)
        lse[rare] = logit[:, 0] - (z[rare, top[:, 0]] / total[rare]).log()
        logps[rare] = target[rare] - lse[rare]
    logps.masked_fill_(column[:, 0] != ids, torch.nan)
    entropy = None
    if with_entropy:
        entropy = torch.cat([torch.special.entr(z[block]).sum(1) for block in _blocks(z)])
        entropy = entropy / total + total.log()
    return Logps(logps, lse, entropy), total


def tile_grad(
    tile: Tile,  # its z is overwritten
    scored: Logps,  # with entropy where `upstream` has dentropy
    upstream: Upstream,
    out: Tensor,  # (n, Vs): the tile's z itself, or a bf16/fp16 buffer
    dtarget: Tensor | None,  # (n,) fp32, or None: leave the target entry in `out`
) -> None:
    """Write the gradient with respect to the raw logits of one tile to `out`."""
    for block in _blocks(tile.z):
        part = None if dtarget is None else dtarget[block]
        _block_grad(_rows_of(tile, block), scored[block], upstream[block], out[block], part)


def _block_grad(
    tile: Tile, scored: Logps, upstream: Upstream, out: Tensor, dtarget: Tensor | None
) -> None:
    z, softcap, inv_temperature = tile.z, tile.head.softcap, tile.rows.inv_temperature
    capped = None
    if tile.bias is not None:
        z.add_(tile.bias)
    if tile.head.logit_scale != 1.0:
        z.mul_(tile.head.logit_scale)
    if softcap:
        capped = torch.tanh(z / softcap)
        z = softcap * capped
    if inv_temperature is not None:
        z = z.mul_(inv_temperature[:, None])
    rows, columns = tile_targets(tile)
    log_p = z.sub_(scored.lse[:, None])
    # The target's 1 - p, from its log-prob: accurate also where p is nearly 1.
    coef = -torch.expm1(log_p[rows, columns]) * upstream.dlogps[rows]
    if upstream.dentropy is None:
        dz = log_p.exp_().mul_(-upstream.dlogps[:, None])
    else:
        p = log_p.exp()
        surprise = log_p.masked_fill_(p == 0, 0.0).add_(scored.entropy[:, None])
        weighted = surprise.mul_(upstream.dentropy[:, None])
        coef.sub_(p[rows, columns] * weighted[rows, columns])
        dz = p.mul_(weighted.add_(upstream.dlogps[:, None]).neg_())
    slope = logit_slope(tile, z)
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


def _move_maximum(z: Tensor, tile: Tile, state: RowState) -> tuple[Tensor, Tensor]:
    """Bring the running maximum and target of the rows up to date with a tile's logits z.

    Return the anchor to subtract before exp(), and by how much the old maximum lies below it.
    """
    new_max = torch.maximum(state.max, z.amax(1))
    # A maximum of -inf cannot be subtracted: any finite anchor keeps exp() at 0.
    anchor = new_max.masked_fill(new_max == -torch.inf, 0.0)
    moved = state.max - anchor
    state.max.copy_(new_max)
    rows, columns = tile_targets(tile)
    state.target[rows] = z[rows, columns]
    return anchor, moved


def _blocks(z: Tensor) -> Iterator[slice]:
    """Yield the rows of a tile in blocks whose intermediate results stay in cache."""
    step = max(1, BLOCK // max(1, z.shape[1]))
    for start in range(0, len(z), step):
        yield slice(start, min(start + step, len(z)))


def _rows_of(tile: Tile, block: slice) -> Tile:
    return tile._replace(z=tile.z[block], rows=tile.rows[block])
