"""Passes over one tile of logits that a GEMM has written: statistics, gradient, target rows.

Tiles are chained through a `RowState`, which then has the softmax statistics of whole rows. Given
these, `tile_grad` turns a tile into dz0, in place if asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .logit_math import merge_stats, one_minus_exp, slice_index, softmax_stats, transform_logits
from .operands import Logps, RowState, Tile, Upstream
from .runtime import INTERPRETED, architecture, jit, launch, launch_for, tl


@jit
def load_logits(
    z_ptr, bias_ptr, offs_v, Vs, logit_scale, softcap, inv_temperature, SOFTCAP: tl.constexpr
):
    """z and dz/dz0 of one block of columns, (1, BLOCK_V); padding is -inf."""
    inside = offs_v[None, :] < Vs
    z0 = tl.load(z_ptr + offs_v[None, :], mask=inside, other=0.0)
    if bias_ptr is not None:
        z0 += tl.load(bias_ptr + offs_v[None, :], mask=inside, other=0.0).to(tl.float32)
    z, slope = transform_logits(z0, logit_scale, softcap, inv_temperature, SOFTCAP)
    return tl.where(inside, z, float("-inf")), slope


@jit(do_not_specialize=["vocab_start"])
def _tile_stats_kernel(
    # inputs: (n, Vs) fp32, (n,) int64, (Vs,) or None, (n,) fp32 or None
    z_ptr,
    ids_ptr,
    bias_ptr,
    inv_temperature_ptr,
    # in and out, (n,) fp32
    max_ptr,
    sum_ptr,
    dot_ptr,
    target_ptr,
    Vs,
    stride_z,
    vocab_start,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row: merge each block of its columns into the running statistics."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    inv_temperature = 1.0
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)[:, None]
    index = slice_index(tl.load(ids_ptr + row), vocab_start, Vs)
    m = tl.load(max_ptr + row)
    s = tl.load(sum_ptr + row)
    d = tl.zeros_like(s)
    if WITH_ENTROPY:
        d = tl.load(dot_ptr + row)
    target = tl.zeros_like(s)
    z_ptr += tl.program_id(0).to(tl.int64) * stride_z
    for start in range(0, Vs, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z, _ = load_logits(
            z_ptr, bias_ptr, offs_v, Vs, logit_scale, softcap, inv_temperature, SOFTCAP
        )
        target += tl.sum(tl.where(offs_v[None, :] == index[:, None], z, 0.0), 1)
        m2, s2, d2 = softmax_stats(z, WITH_ENTROPY)
        m, s, d = merge_stats(m, s, d, m2, s2, d2)
    tl.store(max_ptr + row, m)
    tl.store(sum_ptr + row, s)
    if WITH_ENTROPY:
        tl.store(dot_ptr + row, d)
    tl.store(target_ptr + row, target, mask=index >= 0)


def tile_stats(tile: Tile, state: RowState, with_entropy: bool) -> None:
    """Update `state` in place with one slice of the vocabulary; the tile is not changed."""
    launch_on_tile(
        _tile_stats_kernel,
        "tile_stats",
        tile,
        max_ptr=state.max,
        sum_ptr=state.sum,
        dot_ptr=state.dot,
        target_ptr=state.target,
        WITH_ENTROPY=with_entropy,
    )


def launch_on_tile(kernel: Any, name: str, tile: Tile, **arguments: Any) -> None:
    """Launch a kernel with a program per row of a tile (fp32, adjacent columns)."""
    z = tile.z
    assert z.dtype == torch.float32 and z.stride(1) == 1, "z: fp32 rows of adjacent columns"
    entry = launch_for(name, 0, architecture(z.device))
    launch(kernel, (len(z),), entry, z.device, **tile.arguments(), **arguments)


@jit(do_not_specialize=["vocab_start"])
def _tile_grad_kernel(
    # inputs: (n, Vs) fp32, (n,) int64, (Vs,) or None, (n,) fp32
    z_ptr,
    ids_ptr,
    bias_ptr,
    inv_temperature_ptr,  # or None
    lse_ptr,
    entropy_ptr,
    dlogps_ptr,
    dentropy_ptr,  # or None
    # outputs: (n, Vs), may be z; (n,) fp32 or None
    out_ptr,
    dtarget_ptr,
    Vs,
    stride_z,
    stride_out,
    vocab_start,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row: dz0 = (dlogp ([v = id] - p) - dentropy p (z - lse + entropy)) dz/dz0."""
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = 1.0
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)
    index = slice_index(tl.load(ids_ptr + row), vocab_start, Vs)
    lse = tl.load(lse_ptr + row)
    dlogp = tl.load(dlogps_ptr + row)
    z_ptr += row * stride_z
    out_ptr += row * stride_out
    for start in range(0, Vs, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z, slope = load_logits(
            z_ptr, bias_ptr, offs_v, Vs, logit_scale, softcap, inv_temperature, SOFTCAP
        )
        is_target = offs_v[None, :] == index
        logp = z - lse
        p = tl.exp(logp)
        dz = dlogp * tl.where(is_target, one_minus_exp(logp), -p)
        if dentropy_ptr is not None:
            dentropy = tl.load(dentropy_ptr + row)
            surprise = tl.where(z == float("-inf"), 0.0, logp + tl.load(entropy_ptr + row))
            dz -= dentropy * p * surprise
        dz *= slope
        if dtarget_ptr is not None:
            tl.store(dtarget_ptr + row + tl.zeros_like(offs_v)[None, :], dz, mask=is_target)
            dz = tl.where(is_target, 0.0, dz)
        dz = dz.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_v[None, :], dz, mask=offs_v[None, :] < Vs)


def tile_grad(
    tile: Tile,
    scored: Logps,  # with entropy where `upstream` has dentropy
    upstream: Upstream,
    out: Tensor,  # (n, Vs): the tile's z itself, or a buffer of any floating dtype
    dtarget: Tensor | None,  # (n,) fp32
) -> None:
    """Write the gradient with respect to the raw logits to `out`.

    With `dtarget`, for the rows whose id lies in this slice, the target entry of `out` is 0 and its
    fp32 value goes to `dtarget`. The other rows of `dtarget` are not changed.
    """
    z = tile.z
    assert out.shape == z.shape and out.stride(1) == 1, "out: shaped like z"
    assert upstream.dentropy is None or scored.entropy is not None, "dentropy needs entropy"
    # Triton's interpreter truncates where hardware rounds to nearest: PyTorch rounds for it.
    target = torch.empty_like(z) if INTERPRETED and out.dtype == torch.bfloat16 else out
    launch_on_tile(
        _tile_grad_kernel,
        "tile_grad",
        tile,
        lse_ptr=scored.lse,
        entropy_ptr=scored.entropy,
        dlogps_ptr=upstream.dlogps,
        dentropy_ptr=upstream.dentropy,
        out_ptr=target,
        dtarget_ptr=dtarget,
        stride_out=target.stride(0),
    )
    if target is not out:
        out.copy_(target)


@jit(do_not_specialize=["vocab_start"])
def _scatter_rows_kernel(
    # in and out: (Vs, H) fp32
    acc_ptr,
    # inputs: (n,) int64, (n,) int64, (n,) fp32, (n, H)
    ids_ptr,
    order_ptr,
    coef_ptr,
    rows_ptr,
    n,
    Vs,
    H,
    stride_acc,
    stride_rows,
    vocab_start,
    POSITIONS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Add the runs of equal ids that start at this program's positions, each in order."""
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = offs_h < H
    begin = tl.program_id(0).to(tl.int64) * POSITIONS
    end = tl.minimum(begin + POSITIONS, n)
    # Ids ascend. A slice has few of them: most programs end here.
    if (tl.load(ids_ptr + end - 1) < vocab_start) | (tl.load(ids_ptr + begin) >= vocab_start + Vs):
        end = begin
    for first in range(begin, end):
        id_ = tl.load(ids_ptr + first)
        previous = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
        index = slice_index(id_, vocab_start, Vs)
        if (id_ != previous) & (index >= 0):
            acc_ptrs = acc_ptr + index.to(tl.int64) * stride_acc + offs_h
            total = tl.load(acc_ptrs, mask=inside, other=0.0)
            position = first
            running = True
            while running:
                offs = position + tl.arange(0, BLOCK_R)
                member = tl.load(ids_ptr + offs, mask=offs < n, other=-1) == id_
                order = tl.load(order_ptr + offs, mask=member, other=0)
                coef = tl.load(coef_ptr + order, mask=member, other=0.0)
                rows = tl.load(
                    rows_ptr + order[:, None] * stride_rows + offs_h[None, :],
                    mask=member[:, None] & inside[None, :],
                    other=0.0,
                )
                total += tl.sum(coef[:, None] * rows.to(tl.float32), 0)
                position += BLOCK_R
                running = tl.load(ids_ptr + position, mask=position < n, other=-1) == id_
            tl.store(acc_ptrs, total, mask=inside)


def scatter_rows(
    acc: Tensor,  # (Vs, H) fp32
    sorted_ids: Tensor,  # (n,) int64, ascending
    order: Tensor,  # (n,) int64: the row of `coef` and `rows` that each id belongs to
    coef: Tensor,  # (n,) fp32
    rows: Tensor,  # (n, H)
    vocab_start: int,
) -> None:
    """Add coef[order[i]] * rows[order[i]] to acc[sorted_ids[i] - vocab_start].

    Ids outside the slice are skipped. Deterministic: one program adds a run of equal ids, for a
    block of columns, in the order given.
    """
    n, hidden_size = rows.shape
    assert acc.dtype == torch.float32 and acc.stride(1) == 1, "acc: fp32, adjacent columns"
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    entry = launch_for("scatter_rows", 0, architecture(acc.device))
    launch(
        _scatter_rows_kernel,
        (-(-n // entry.blocks["POSITIONS"]), -(-hidden_size // entry.blocks["BLOCK_H"])),
        entry,
        acc.device,
        acc_ptr=acc,
        ids_ptr=sorted_ids,
        order_ptr=order,
        coef_ptr=coef,
        rows_ptr=rows,
        n=n,
        Vs=acc.shape[0],
        H=hidden_size,
        stride_acc=acc.stride(0),
        stride_rows=rows.stride(0),
        vocab_start=vocab_start,
    )
