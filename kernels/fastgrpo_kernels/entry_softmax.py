"""The softmax over a list of entries of each row: dot products, scores, gradients.

A row has few entries beside the vocabulary, so that no tile of logits is made. `entry_dots` and
`entry_grads` take blocks of entries, wherever rows begin, and `segment_softmax` takes rows. The
sums over entries that give dhidden and dweight are those of `sparse_entries`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .logit_math import log1p_exp, merge_stats, one_minus_exp, softmax_stats, transform_logits
from .operands import EntryList, Head, Logps, Rows, Upstream
from .runtime import architecture, jit, launch, launch_for, tl


@jit(do_not_specialize=["E"])
def _entry_dots_kernel(
    # in and out: (E,) fp32
    out_ptr,
    # inputs: (n, H), (E,) int64, (M, H), (E,) int64
    rows_ptr,
    row_ptr,
    table_ptr,
    index_ptr,
    E,
    H,
    stride_rows,
    stride_table,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A block of entries: the products of all columns are added up lane by lane, then once over."""
    offs_e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = offs_e < E
    row = tl.load(row_ptr + offs_e, mask=inside, other=0)
    index = tl.load(index_ptr + offs_e, mask=inside, other=0)
    products = tl.zeros([BLOCK_E, BLOCK_H], tl.float32)
    for start_h in range(0, H, BLOCK_H):
        offs_h = start_h + tl.arange(0, BLOCK_H)
        both = inside[:, None] & (offs_h < H)[None, :]
        h = tl.load(
            rows_ptr + row[:, None] * stride_rows + offs_h[None, :], mask=both, other=0.0
        ).to(tl.float32)
        w = tl.load(
            table_ptr + index[:, None] * stride_table + offs_h[None, :], mask=both, other=0.0
        )
        products += h * w.to(tl.float32)
    dots = tl.load(out_ptr + offs_e, mask=inside, other=0.0) + tl.sum(products, 1)
    tl.store(out_ptr + offs_e, dots, mask=inside)


def entry_dots(
    out: Tensor,  # (E,) fp32
    rows: Tensor,  # (n, H)
    row: Tensor,  # (E,) int64 row of `rows`
    table: Tensor,  # (M, H)
    index: Tensor,  # (E,) int64 row of the table
) -> None:
    """Add the dot product of rows[row] and table[index] to each entry, from fp32 products."""
    rows, table = (x if x.stride(1) == 1 else x.contiguous() for x in (rows, table))
    entry = launch_for("entry_dots", 0, architecture(out.device))
    launch(
        _entry_dots_kernel,
        (-(-len(out) // entry.blocks["BLOCK_E"]),),
        entry,
        out.device,
        out_ptr=out,
        rows_ptr=rows,
        row_ptr=row,
        table_ptr=table,
        index_ptr=index,
        E=len(out),
        H=rows.shape[1],
        stride_rows=rows.stride(0),
        stride_table=table.stride(0),
    )


@jit
def _segment_softmax_kernel(
    # in and out: (E,) fp32, raw logits without bias, then z
    z_ptr,
    # inputs: (E,) int64, (E,) bool, (n + 1,) int64, (V,) or None, (n,) fp32 or None
    ids_ptr,
    is_target_ptr,
    bounds_ptr,
    bias_ptr,
    inv_temperature_ptr,
    # outputs: (n,) fp32
    logps_ptr,
    lse_ptr,
    entropy_ptr,  # or None
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One row: statistics of its entries beside the target, which is merged with them at the end.

    With m and s of the others, L = m + log s - z_y is the log of the odds against the target, and
    its log-prob is -log(1 + exp(L)): its relative accuracy stays as the probability goes to 1.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    start = tl.load(bounds_ptr + tl.program_id(0))
    end = tl.load(bounds_ptr + tl.program_id(0) + 1)
    inv_temperature = 1.0
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)[:, None]
    m = tl.full([1], float("-inf"), tl.float32)
    s = tl.zeros([1], tl.float32)
    d = tl.zeros([1], tl.float32)
    target = tl.zeros([1], tl.float32)
    found = tl.zeros([1], tl.int32)
    for block in range(start, end, BLOCK_E):
        offs_e = block + tl.arange(0, BLOCK_E)[None, :]
        inside = offs_e < end
        z0 = tl.load(z_ptr + offs_e, mask=inside, other=0.0)
        if bias_ptr is not None:
            v = tl.load(ids_ptr + offs_e, mask=inside, other=0)
            z0 += tl.load(bias_ptr + v, mask=inside, other=0.0).to(tl.float32)
        z, _ = transform_logits(z0, logit_scale, softcap, inv_temperature, SOFTCAP)
        tl.store(z_ptr + offs_e, z, mask=inside)
        is_target = tl.load(is_target_ptr + offs_e, mask=inside, other=0).to(tl.int32)
        target += tl.sum(tl.where(is_target != 0, z, 0.0), 1)
        found += tl.sum(is_target, 1)
        other = inside & (is_target == 0)
        m2, s2, d2 = softmax_stats(tl.where(other, z, float("-inf")), entropy_ptr is not None)
        m, s, d = merge_stats(m, s, d, m2, s2, d2)
    nan = tl.full([1], float("nan"), tl.float32)
    # A target of +inf is an overflow, not certainty.
    scored = (found > 0) & (target < float("inf"))
    logp = tl.where(scored, 0.0 - log1p_exp((m - target) + tl.log(s)), nan)
    own = tl.where(found > 0, target, float("-inf"))
    one = tl.where(own == float("-inf"), 0.0, 1.0)
    m, s, d = merge_stats(m, s, d, own, one, tl.zeros_like(d))
    log_sum = tl.log(s)
    tl.store(logps_ptr + row, logp)
    tl.store(lse_ptr + row, m + log_sum)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, log_sum - d / s)


def segment_softmax(
    entries: EntryList,
    bounds: Tensor,  # (n + 1,) int64: row i has the entries bounds[i] to bounds[i + 1]
    rows: Rows,
    head: Head,
    with_entropy: bool,
) -> Logps:
    """Return the scores of rows by the softmax over their entries; the target must be one of them.

    `entries.z` is h W_e and becomes z, in place. Where the target is not among the entries, the
    log-prob is NaN; a row without entries has no scores.
    """
    scored = Logps.empty(rows, entries.z.dtype, with_entropy)
    launch(
        _segment_softmax_kernel,
        (len(rows.ids),),
        launch_for("segment_softmax", 0, architecture(bounds.device)),
        bounds.device,
        z_ptr=entries.z,
        ids_ptr=entries.ids,
        is_target_ptr=entries.is_target,
        bounds_ptr=bounds,
        bias_ptr=head.bias,
        inv_temperature_ptr=rows.inv_temperature,
        logps_ptr=scored.logps,
        lse_ptr=scored.lse,
        entropy_ptr=scored.entropy,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        SOFTCAP=head.softcap != 0.0,
    )
    return scored


@jit(do_not_specialize=["E"])
def _entry_grads_kernel(
    # inputs: (E,) fp32, (E,) int64, (E,) bool, (E,) fp32 or None
    z_ptr,
    row_ptr,
    is_target_ptr,
    inclusion_ptr,
    # (n,) fp32
    inv_temperature_ptr,  # or None
    logps_ptr,
    lse_ptr,
    entropy_ptr,
    dlogps_ptr,
    dentropy_ptr,  # or None
    # output: (E,) fp32
    out_ptr,
    E,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dz0 of a block of entries, as `_tile_grad_kernel` computes it of a row's columns."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = offs < E
    row = tl.load(row_ptr + offs, mask=inside, other=0)
    z = tl.load(z_ptr + offs, mask=inside, other=0.0)
    is_target = tl.load(is_target_ptr + offs, mask=inside, other=0) != 0
    logp = z - tl.load(lse_ptr + row, mask=inside, other=0.0)
    p = tl.exp(logp)
    counted = p
    if inclusion_ptr is not None:
        inclusion = tl.load(inclusion_ptr + offs, mask=inside, other=1.0)
        counted = tl.where(is_target, p, p / inclusion)
    own = one_minus_exp(tl.load(logps_ptr + row, mask=inside, other=0.0))
    dlogp = tl.load(dlogps_ptr + row, mask=inside, other=0.0)
    dz = dlogp * tl.where(is_target, own, -counted)
    if dentropy_ptr is not None:
        dentropy = tl.load(dentropy_ptr + row, mask=inside, other=0.0)
        entropy = tl.load(entropy_ptr + row, mask=inside, other=0.0)
        dz -= dentropy * counted * tl.where(p == 0.0, 0.0, logp + entropy)
    dz *= logit_scale
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row, mask=inside, other=1.0)
        dz *= inv_temperature
        z = z / inv_temperature
    if SOFTCAP:
        dz *= 1.0 - (z / softcap) * (z / softcap)
    tl.store(out_ptr + offs, dz, mask=inside)


def entry_grads(
    entries: EntryList,
    rows: Rows,
    head: Head,
    scored: Logps,  # with entropy where `upstream` has dentropy
    upstream: Upstream,
    inclusion: Tensor | None = None,  # (E,) fp32: probability of being there; None: 1
) -> Tensor:
    """Return dL/dz0 (E,) fp32 of entries: exact at the target, elsewhere p counts p / inclusion."""
    assert upstream.dentropy is None or scored.entropy is not None, "dentropy needs entropy"
    out = torch.empty_like(entries.z)
    entry = launch_for("entry_grads", 0, architecture(out.device))
    launch(
        _entry_grads_kernel,
        (-(-len(out) // entry.blocks["BLOCK_E"]),),
        entry,
        out.device,
        z_ptr=entries.z,
        row_ptr=entries.row,
        is_target_ptr=entries.is_target,
        inclusion_ptr=inclusion,
        inv_temperature_ptr=rows.inv_temperature,
        logps_ptr=scored.logps,
        lse_ptr=scored.lse,
        entropy_ptr=scored.entropy,
        dlogps_ptr=upstream.dlogps,
        dentropy_ptr=upstream.dentropy,
        out_ptr=out,
        E=len(out),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        SOFTCAP=head.softcap != 0.0,
    )
    return out
