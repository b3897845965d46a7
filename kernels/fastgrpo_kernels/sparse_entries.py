"""The few entries of a row that the unbiased sparse backward keeps: drawn, scored, summed.

An entry v of a row is kept if e = exp(z_v - anchor) > u_v. The anchor is log(tau) above an estimate
of the row's lse, so that e is about p_v / tau. The uniform number u_v is the xor of one random word
per column and one per row. It is exactly uniform, whatever the column words are, and any two of
these numbers are independent. Mathematics and proofs: docs/sparse-backward.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .anchored_logps import Marks, anchored_logps_fwd, mask_words
from .logit_math import slice_index, transform_logits
from .logits_tile import launch_on_tile, load_logits
from .operands import Draw, Head, Logps, Rows, Tile, adjacent_columns, dot_arguments, take
from .runtime import INTERPRETED, architecture, jit, launch, launch_for, tl

WORD_BITS = 23  # the bits of an fp32 mantissa
MASK_BYTES = 128 * 2**20


class Kept(NamedTuple):
    """Entries of each row in slots: its target first, then those that were drawn."""

    ids: Tensor  # (n, K) int32
    logits: Tensor  # (n, K) z at these entries
    count: Tensor  # (n,) int32 entries found; those beyond K have no slot and are lost

    __getitem__ = take  # type: ignore[assignment]


@jit
def uniform(column_words, row_words):
    """A number in [0, 1) from words of 23 bits, exact in fp32."""
    return (column_words ^ row_words).to(tl.float32) * (1 / 8388608)


@jit(do_not_specialize=["vocab_start"])
def _tile_draw_kernel(
    # inputs: (n, Vs) fp32, (n,) int64, (Vs,) or None, (n,) fp32 or None, (n,) fp32
    z_ptr,
    ids_ptr,
    bias_ptr,
    inv_temperature_ptr,
    anchor_ptr,
    # (Vs,) int32, (n,) int32
    column_words_ptr,
    row_words_ptr,
    # in and out: (n, K) int32, (n, K) fp32, (n,) int32
    kept_ids_ptr,
    kept_logits_ptr,
    count_ptr,
    Vs,
    K,
    stride_z,
    vocab_start,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row: append the kept entries of each block of columns to the row's slots."""
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = 1.0
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)
    index = slice_index(tl.load(ids_ptr + row), vocab_start, Vs)
    anchor = tl.load(anchor_ptr + row)
    row_word = tl.load(row_words_ptr + row)
    count = tl.load(count_ptr + row)
    z_ptr += row * stride_z
    kept_ids_ptr += row * K
    kept_logits_ptr += row * K
    for start in range(0, Vs, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)[None, :]
        z, _ = load_logits(
            z_ptr, bias_ptr, start + tl.arange(0, BLOCK_V), Vs, logit_scale, softcap,
            inv_temperature, SOFTCAP,
        )  # fmt: skip
        words = tl.load(column_words_ptr + offs_v, mask=offs_v < Vs, other=0)
        e = tl.where(offs_v == index, 0.0, tl.exp(z - anchor))
        keep = e > uniform(words, row_word)
        taken = keep.to(tl.int32)
        slot = count + tl.cumsum(taken, 1) - taken
        tl.store(kept_ids_ptr + slot, offs_v + vocab_start, mask=keep & (slot < K))
        tl.store(kept_logits_ptr + slot, z, mask=keep & (slot < K))
        count += tl.sum(taken)
    tl.store(count_ptr + row, count)


def tile_draw(tile: Tile, draw: Draw, kept: Kept) -> None:
    """Append the kept entries of one slice of the vocabulary to `kept`, in column order."""
    launch_on_tile(
        _tile_draw_kernel,
        "tile_draw",
        tile,
        anchor_ptr=draw.anchor,
        column_words_ptr=draw.column_words[tile.columns],
        row_words_ptr=draw.row_words,
        kept_ids_ptr=kept.ids,
        kept_logits_ptr=kept.logits,
        count_ptr=kept.count,
        K=kept.ids.shape[1],
    )


@jit
def _bits_set(words):
    """How many bits of each 32-bit word are set."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@jit
def _compact_mask_kernel(
    mask_ptr,  # (n, W) int32
    # in and out: (n, K) int32, (n,) int32
    kept_ids_ptr,
    count_ptr,
    W,
    K,
    stride_mask,
    BLOCK_W: tl.constexpr,
):
    """One row: the columns of its set bits, word by word."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    mask_ptr += row * stride_mask
    kept_ids_ptr += row * K
    for start in range(0, W, BLOCK_W):
        offs = start + tl.arange(0, BLOCK_W)
        words = tl.load(mask_ptr + offs, mask=offs < W, other=0).to(tl.uint32, bitcast=True)
        bits = _bits_set(words)
        slot = count + tl.cumsum(bits, 0) - bits
        count += tl.sum(bits)
        rounds = tl.max(bits)
        for _ in range(0, rounds):
            rest = words & (words - 1)
            lowest = words ^ rest
            # A power of two is exact in fp32: its exponent is the bit's position.
            bit = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            column = offs // 4 * 128 + bit // 2 * 8 + offs % 4 * 2 + bit % 2
            tl.store(kept_ids_ptr + slot, column, mask=(words != 0) & (slot < K))
            words = rest
            slot += 1
    tl.store(count_ptr + row, count)


def compact_mask(mask: Tensor, kept: Kept) -> None:
    """Add the set bits of mask (n, W) int32 to `kept.ids` and `kept.count`, in place.

    Bit b of word w stands for column 128 (w // 4) + 8 (b // 2) + 2 (w % 4) + b % 2. A word holds
    those entries of a row that one thread has in the accumulator of a tensor core.
    """
    n, words = mask.shape
    launch(
        _compact_mask_kernel,
        (n,),
        launch_for("compact_mask", 0, architecture(mask.device)),
        mask.device,
        mask_ptr=mask,
        kept_ids_ptr=kept.ids,
        count_ptr=kept.count,
        W=words,
        K=kept.ids.shape[1],
        stride_mask=mask.stride(0),
    )


@jit
def _entry_logits_kernel(
    # inputs: (n, H), (V, H), (V,) or None, (n,) fp32 or None, (n, K) int32, (n,) int32 or None
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    inv_temperature_ptr,
    entries_ptr,
    count_ptr,
    # output: (n, K) fp32
    out_ptr,
    K,
    H,
    stride_hidden,
    stride_weight,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One row: z at some of its entries, BLOCK_E at a time."""
    row = tl.program_id(0).to(tl.int64)
    count = K
    if count_ptr is not None:
        count = tl.minimum(tl.load(count_ptr + row), K)
    inv_temperature = 1.0
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)
    hidden_ptr += row * stride_hidden
    for start in range(0, count, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        inside = offs_e < count
        v = tl.load(entries_ptr + row * K + offs_e, mask=inside, other=0).to(tl.int64)
        total = tl.zeros([BLOCK_E], tl.float32)
        for start_h in range(0, H, BLOCK_H):
            offs_h = start_h + tl.arange(0, BLOCK_H)
            h = tl.load(hidden_ptr + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)
            w = tl.load(
                weight_ptr + v[:, None] * stride_weight + offs_h[None, :],
                mask=inside[:, None] & (offs_h < H)[None, :],
                other=0.0,
            )
            total += tl.sum(h[None, :] * w.to(tl.float32), 1)
        if bias_ptr is not None:
            total += tl.load(bias_ptr + v, mask=inside, other=0.0).to(tl.float32)
        z, _ = transform_logits(total, logit_scale, softcap, inv_temperature, SOFTCAP)
        tl.store(out_ptr + row * K + offs_e, z, mask=inside)


def entry_logits(
    rows: Rows,
    head: Head,
    entries: Tensor,  # (n, K) int32 columns
    count: Tensor | None,  # (n,) int32: the number of a row's entries; None: all K
    out: Tensor,  # (n, K) fp32
) -> None:
    """Write the logits z of some entries of each row to `out`, from fp32 dot products."""
    rows, head = adjacent_columns(rows, head)
    n, slots = entries.shape
    name, device = "entry_logits" if slots > 1 else "target_logits", rows.hidden.device
    launch(
        _entry_logits_kernel,
        (n,),
        launch_for(name, 0, architecture(device)),
        device,
        **dot_arguments(rows, head),
        entries_ptr=entries,
        count_ptr=count,
        out_ptr=out,
        K=slots,
    )


def linear_draw_fwd(rows: Rows, head: Head, with_entropy: bool, draw: Draw, kept: Kept) -> Logps:
    """Score rows as `linear_logps_fwd` does, and add the entries that they keep to `kept`.

    Requires `has_anchored`. The epilogue of the product draws the entries into a mask of V / 8
    bytes per row, at most 128 MiB at once. Their logits are then computed again from the operands.
    For rows that had to be scored again the count is K + 1, more than there are slots.
    """
    n, vocab_size = len(rows.ids), len(head.weight)
    words, written = mask_words(vocab_size), 4 * -(-vocab_size // 128)
    at_once = max(1, MASK_BYTES // (4 * words))
    mask = torch.empty((min(at_once, n), words), dtype=torch.int32, device=rows.ids.device)
    scored = []
    for start in range(0, n, at_once):
        c = slice(start, min(start + at_once, n))
        some, marks = kept[c], Marks(draw[c], mask[: c.stop - c.start])
        result = anchored_logps_fwd(rows[c], head, with_entropy, marks=marks)
        compact_mask(marks.mask[:, :written], some)
        entry_logits(rows[c], head, some.ids, some.count, some.logits)
        some.count.masked_fill_(result.redone, some.ids.shape[1] + 1)
        scored.append(result.scored)
    return Logps.cat(scored)


@jit(do_not_specialize=["B"])
def _bag_sum_kernel(
    # in and out: (B, H)
    out_ptr,
    # inputs: (M, H), (E,) int64, (E,) fp32, (B + 1,) int64
    table_ptr,
    index_ptr,
    coef_ptr,
    bounds_ptr,
    B,
    H,
    stride_out,
    stride_table,
    BAGS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Some bags, one block of columns: sum each bag in order, BLOCK_E rows at a time."""
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside_h = offs_h < H
    first = tl.program_id(0).to(tl.int64) * BAGS
    for bag in range(first, tl.minimum(first + BAGS, B)):
        start = tl.load(bounds_ptr + bag)
        end = tl.load(bounds_ptr + bag + 1)
        if end > start:
            out_ptrs = out_ptr + bag * stride_out + offs_h
            total = tl.load(out_ptrs, mask=inside_h, other=0.0).to(tl.float32)
            for block in range(start, end, BLOCK_E):
                offs_e = block + tl.arange(0, BLOCK_E)
                index = tl.load(index_ptr + offs_e, mask=offs_e < end, other=0)
                coef = tl.load(coef_ptr + offs_e, mask=offs_e < end, other=0.0)
                rows = tl.load(
                    table_ptr + index[:, None] * stride_table + offs_h[None, :],
                    mask=(offs_e < end)[:, None] & inside_h[None, :],
                    other=0.0,
                )
                total += tl.sum(coef[:, None] * rows.to(tl.float32), 0)
            tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside_h)


def bag_sum(
    out: Tensor,  # (B, H)
    table: Tensor,  # (M, H)
    index: Tensor,  # (E,) int64 rows of the table
    coef: Tensor,  # (E,) fp32
    bounds: Tensor,  # (B + 1,) int64: bag b has the entries bounds[b] to bounds[b + 1]
) -> None:
    """Add the sum of coef * table[index] over each bag to its row of `out`, rounded once.

    Deterministic: one program sums a bag's block of columns, in order. Rows whose bag is empty are
    neither read nor written.
    """
    bags, hidden_size = out.shape
    table = table if table.stride(1) == 1 else table.contiguous()
    name = "bag_sum" if hidden_size > 1 else "bag_sum_column"
    entry = launch_for(name, 0, architecture(out.device))
    # Triton's interpreter truncates where hardware rounds to nearest: PyTorch rounds for it.
    total = out.float() if INTERPRETED else out
    # The gradient of a head that is stored (H, V) has its strides.
    total = total if total.stride(1) == 1 else total.contiguous()
    if len(index):
        launch(
            _bag_sum_kernel,
            (-(-bags // entry.blocks["BAGS"]), -(-hidden_size // entry.blocks["BLOCK_H"])),
            entry,
            out.device,
            out_ptr=total,
            table_ptr=table,
            index_ptr=index,
            coef_ptr=coef,
            bounds_ptr=bounds,
            B=bags,
            H=hidden_size,
            stride_out=total.stride(0),
            stride_table=table.stride(0),
        )
    if total is not out:
        out.copy_(total)


def sum_by_id(
    out: Tensor,  # (V, H)
    sorted_ids: Tensor,  # (E,) int64, ascending
    table: Tensor,  # (M, H)
    index: Tensor,  # (E,) int64 rows of the table
    coef: Tensor,  # (E,) fp32
) -> None:
    """Add coef * table[index] to the row of `out` that each id names, as `bag_sum` of V bags."""
    edges = torch.arange(len(out) + 1, device=out.device)
    bag_sum(out, table, index, coef, torch.searchsorted(sorted_ids, edges))
