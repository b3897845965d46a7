"""Log-probs, log-sum-exp and entropy of a linear head without logits: 2NVH, O(N) numbers written.

A program multiplies a block of rows with one split of the vocabulary, tile by tile. It merges each
tile's logits into the softmax statistics of its rows while they are in registers. A second kernel
merges the splits in order. The splits depend on the vocabulary alone, so a row's result does not
depend on the other rows of the batch, bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .logit_math import merge_stats, slice_index, softmax_stats, transform_logits
from .operands import Head, Logps, Rows, adjacent_columns, logit_arguments
from .runtime import (
    INTERPRETED,
    Launch,
    architecture,
    dot_precision,
    jit,
    launch,
    launch_for,
    tl,
)


class RowList(NamedTuple):
    """A subset of the rows, listed on the device: the host need not know how many they are."""

    index: Tensor  # (n,) int32: the first `count` are the listed rows, in ascending order
    count: Tensor  # (1,) int32


@jit
def _grouped_program(N, V, BLOCK_N: tl.constexpr, SPLIT_V: tl.constexpr, GROUP_N: tl.constexpr):
    """(row block, split) of this program: GROUP_N row blocks share the splits in flight in L2."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(N, BLOCK_N)
    group_size = GROUP_N * tl.cdiv(V, SPLIT_V)
    first = program // group_size * GROUP_N
    rows = tl.minimum(row_blocks - first, GROUP_N)
    return first + program % group_size % rows, program % group_size // rows


@jit
def _listed_rows(row_block, index_ptr, count_ptr, N, BLOCK_N: tl.constexpr):
    """This block's positions in the list, the rows there, and the length of the list.

    Without a list: all rows.
    """
    places = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = places
    count = N
    if index_ptr is not None:
        count = tl.load(count_ptr)
        rows = tl.load(index_ptr + places, mask=places < count, other=0).to(tl.int64)
    return places, rows, count


@jit
def _logits(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    rows,  # (BLOCK_N,) int64
    inside_n,  # (BLOCK_N, 1)
    offs_v,  # (BLOCK_V,)
    V,
    H,
    stride_hidden,
    stride_weight,
    RAGGED_H: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """z0 = h W^T + b of some rows and columns, fp32 (BLOCK_N, BLOCK_V)."""
    inside_v = offs_v[:, None] < V
    hidden_ptrs = hidden_ptr + rows[:, None] * stride_hidden
    weight_ptrs = weight_ptr + offs_v[:, None].to(tl.int64) * stride_weight
    z0 = tl.zeros([rows.shape[0], offs_v.shape[0]], tl.float32)
    for start_h in range(0, H, BLOCK_H):
        offs_h = start_h + tl.arange(0, BLOCK_H)[None, :]
        mask_n, mask_v = inside_n, inside_v
        if RAGGED_H:
            mask_n, mask_v = inside_n & (offs_h < H), inside_v & (offs_h < H)
        h = tl.load(hidden_ptrs + offs_h, mask=mask_n, other=0.0)
        w = tl.load(weight_ptrs + offs_h, mask=mask_v, other=0.0)
        if UPCAST:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        z0 = tl.dot(h, tl.trans(w), z0, input_precision=PRECISION)
    if bias_ptr is not None:
        z0 += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    return z0


@jit(do_not_specialize=["N"])
def _linear_logps_kernel(
    # inputs: (N, H), (V, H), (N,) int64, (V,) or None, (N,) fp32 or None
    hidden_ptr,
    weight_ptr,
    ids_ptr,
    bias_ptr,
    inv_temperature_ptr,
    # a RowList or None
    index_ptr,
    count_ptr,
    # output: (3 or 4, splits, N) fp32: max, sum, target, dot
    partials_ptr,
    N,
    V,
    H,
    stride_hidden,
    stride_weight,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    RAGGED_H: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_V: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """One block of rows, one split of the vocabulary: softmax statistics and the target's logit."""
    row_block, split = _grouped_program(N, V, BLOCK_N, SPLIT_V, GROUP_N)
    places, rows, count = _listed_rows(row_block, index_ptr, count_ptr, N, BLOCK_N)
    inside = places < count
    ids = tl.load(ids_ptr + rows, mask=inside, other=-1)
    inv_temperature = 1.0
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + rows, mask=inside, other=1.0)[:, None]
    index = slice_index(ids, 0, V)
    end = tl.minimum(V, (split + 1) * SPLIT_V)
    if index_ptr is not None:
        end = tl.where(row_block * BLOCK_N < count, end, 0)

    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    d = tl.zeros([BLOCK_N], tl.float32)
    target = tl.zeros([BLOCK_N], tl.float32)
    for start in range(split * SPLIT_V, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z0 = _logits(
            hidden_ptr, weight_ptr, bias_ptr, rows, inside[:, None], offs_v, V, H, stride_hidden,
            stride_weight, RAGGED_H, UPCAST, PRECISION, BLOCK_H,
        )  # fmt: skip
        z, _ = transform_logits(z0, logit_scale, softcap, inv_temperature, SOFTCAP)
        z = tl.where(offs_v[None, :] < V, z, float("-inf"))
        target += tl.sum(tl.where(offs_v[None, :] == index[:, None], z, 0.0), 1)
        m2, s2, d2 = softmax_stats(z, WITH_ENTROPY)
        m, s, d = merge_stats(m, s, d, m2, s2, d2)

    partials_ptr += split.to(tl.int64) * N + places
    # `tl.cast`, as a V of 1 is a constant, and so is what is computed from it.
    stride_stat = tl.cast(tl.cdiv(V, SPLIT_V), tl.int64) * N
    tl.store(partials_ptr, m, mask=inside)
    tl.store(partials_ptr + stride_stat, s, mask=inside)
    tl.store(partials_ptr + 2 * stride_stat, target, mask=inside)
    if WITH_ENTROPY:
        tl.store(partials_ptr + 3 * stride_stat, d, mask=inside)


@jit(do_not_specialize=["N"])
def _merge_splits_kernel(
    # inputs: (3 or 4, splits, N) fp32, (N,) int64, a RowList or None
    partials_ptr,
    ids_ptr,
    index_ptr,
    count_ptr,
    # outputs, (N,) fp32
    logps_ptr,
    lse_ptr,
    entropy_ptr,  # or None
    N,
    V,
    SPLIT_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merge the splits' statistics in order; the target comes from the split that owns it."""
    places, rows, count = _listed_rows(tl.program_id(0), index_ptr, count_ptr, N, BLOCK_N)
    inside = places < count
    splits = tl.cdiv(V, SPLIT_V)
    stride_stat = tl.cast(splits, tl.int64) * N
    partials_ptr += places
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    d = tl.zeros([BLOCK_N], tl.float32)
    for split in range(0, splits):
        split_ptr = partials_ptr + tl.cast(split, tl.int64) * N
        m2 = tl.load(split_ptr, mask=inside, other=float("-inf"))
        s2 = tl.load(split_ptr + stride_stat, mask=inside, other=0.0)
        d2 = tl.zeros_like(s2)
        if entropy_ptr is not None:
            d2 = tl.load(split_ptr + 3 * stride_stat, mask=inside, other=0.0)
        m, s, d = merge_stats(m, s, d, m2, s2, d2)

    ids = tl.load(ids_ptr + rows, mask=inside, other=-1)
    valid = (ids >= 0) & (ids < V)
    owner = tl.where(valid, ids // SPLIT_V, 0)
    target = tl.load(partials_ptr + 2 * stride_stat + owner * N, mask=inside & valid, other=0.0)
    log_sum = tl.log(s)
    # (target - m) first, rather than target - lse: exact at the maximum and never above 0.
    logps = tl.where(valid, (target - m) - log_sum, float("nan"))
    tl.store(logps_ptr + rows, logps, mask=inside)
    tl.store(lse_ptr + rows, m + log_sum, mask=inside)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + rows, log_sum - d / s, mask=inside)


@jit(do_not_specialize=["N"])
def _exps_kernel(
    # inputs: (N, H), (V, H), (N,) int64, (V,) or None, (N,) fp32 or None, (N,) fp32, a RowList
    hidden_ptr,
    weight_ptr,
    ids_ptr,
    bias_ptr,
    inv_temperature_ptr,
    lse_ptr,
    index_ptr,
    count_ptr,
    # output: (N, V)
    exps_ptr,
    N,
    V,
    H,
    stride_hidden,
    stride_weight,
    stride_exps,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    RAGGED_H: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_V: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """One block of listed rows, one split: exp(z - lse) times the slope of the softcap."""
    row_block, split = _grouped_program(N, V, BLOCK_N, SPLIT_V, GROUP_N)
    places, rows, count = _listed_rows(row_block, index_ptr, count_ptr, N, BLOCK_N)
    inside = places < count
    index = slice_index(tl.load(ids_ptr + rows, mask=inside, other=-1), 0, V)
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)[:, None]
    inv_temperature = 1.0
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + rows, mask=inside, other=1.0)[:, None]
    end = tl.where(row_block * BLOCK_N < count, tl.minimum(V, (split + 1) * SPLIT_V), 0)
    for start in range(split * SPLIT_V, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z0 = _logits(
            hidden_ptr, weight_ptr, bias_ptr, rows, inside[:, None], offs_v, V, H, stride_hidden,
            stride_weight, RAGGED_H, UPCAST, PRECISION, BLOCK_H,
        )  # fmt: skip
        z, slope = transform_logits(z0, logit_scale, softcap, inv_temperature, SOFTCAP)
        e = tl.exp(z - lse)
        if SOFTCAP:
            e *= slope / (logit_scale * inv_temperature)
        e = tl.where(offs_v[None, :] == index[:, None], 0.0, e)
        tl.store(
            exps_ptr + rows[:, None] * stride_exps + offs_v[None, :],
            e.to(exps_ptr.dtype.element_ty),
            mask=inside[:, None] & (offs_v[None, :] < V),
        )


def _gemm(hidden: Tensor, weight: Tensor, narrow: bool = False) -> tuple[Launch, dict[str, Any]]:
    """The launch entry of a portable logits GEMM, and how it treats its operands.

    `narrow` tiles leave registers for an epilogue that stores a number per logit.
    """
    same_dtype = hidden.dtype == weight.dtype
    bits = 32 if hidden.dtype == torch.float32 or not same_dtype else 16
    arch = architecture(hidden.device)
    entry = launch_for("linear_logps", bits, arch)
    ragged = narrow or hidden.shape[1] % entry.blocks["BLOCK_H"] != 0
    if ragged:
        entry = launch_for("linear_logps_ragged_h", bits, arch)
    # The interpreter multiplies 16-bit floats as if their bits were integers.
    upcast = INTERPRETED or not same_dtype
    return entry, {"RAGGED_H": ragged, "UPCAST": upcast, "PRECISION": dot_precision(bits)}


def score_rows(rows: Rows, head: Head, out: Logps, some: RowList | None = None) -> None:
    """Write the scores of the listed rows to `out`; of all rows if there is no list.

    The operands must have adjacent columns.
    """
    n, vocab_size, device = len(rows.ids), len(head.weight), rows.hidden.device
    entry, operands = _gemm(rows.hidden, head.weight)
    merge = launch_for("merge_splits", 0, architecture(device))
    blocks, split_size = -(-n // entry.blocks["BLOCK_N"]), entry.blocks["SPLIT_V"]
    splits, with_entropy = -(-vocab_size // split_size), out.entropy is not None
    listed = _list_arguments(some)
    shape = (3 + with_entropy, splits, n)
    partials = torch.empty(shape, dtype=torch.float32, device=device)
    launch(
        _linear_logps_kernel,
        (blocks * splits,),
        entry,
        device,
        **logit_arguments(rows, head),
        **listed,
        partials_ptr=partials,
        WITH_ENTROPY=with_entropy,
        **operands,
    )
    launch(
        _merge_splits_kernel,
        (-(-n // merge.blocks["BLOCK_N"]),),
        merge,
        device,
        partials_ptr=partials,
        ids_ptr=rows.ids,
        **listed,
        logps_ptr=out.logps,
        lse_ptr=out.lse,
        entropy_ptr=out.entropy,
        N=n,
        V=vocab_size,
        SPLIT_V=split_size,
    )


def exps_of_rows(rows: Rows, head: Head, lse: Tensor, exps: Tensor, some: RowList) -> None:
    """Write exp(z - lse) of the listed rows to `exps` (n, V), times the softcap's derivative.

    The target's entry is 0. The operands must have adjacent columns.
    """
    entry, operands = _gemm(rows.hidden, head.weight, narrow=True)
    n, vocab_size = exps.shape
    blocks = -(-n // entry.blocks["BLOCK_N"]) * -(-vocab_size // entry.blocks["SPLIT_V"])
    launch(
        _exps_kernel,
        (blocks,),
        entry,
        rows.hidden.device,
        **logit_arguments(rows, head),
        **_list_arguments(some),
        lse_ptr=lse,
        exps_ptr=exps,
        stride_exps=exps.stride(0),
        **operands,
    )


def _list_arguments(some: RowList | None) -> dict[str, Tensor | None]:
    index, count = some or (None, None)
    return {"index_ptr": index, "count_ptr": count}


def linear_logps_fwd(
    rows: Rows,  # hidden bf16 | fp16 | fp32, inv_temperature fp32
    head: Head,  # weight in hidden's dtype, or fp32
    with_entropy: bool,
) -> Logps:
    """Return the scores of the rows, fp32.

    Rows may be strided; operands whose columns are not adjacent are copied. The log-prob of a row
    whose id is not in [0, V) is NaN. Scratch: 12 or 16 bytes per row and split of 4096 vocabulary
    entries.
    """
    rows, head = adjacent_columns(rows, head)
    out = Logps.empty(rows, torch.float32, with_entropy)
    score_rows(rows, head, out)
    return out
