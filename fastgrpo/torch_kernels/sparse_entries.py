"""Torch twins of `fastgrpo_kernels.sparse_entries`: the entries that a sparse backward keeps."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.torch_kernels.logit_math import scaled_logits, tile_logits, tile_targets
from fastgrpo_kernels import WORD_BITS, Draw, Head, Kept, Rows, Tile

BLOCK = 2**22  # numbers in a gathered or summed block
SUM_BLOCK = 2**18  # numbers of sums by id that are summed at once, in cache
DRAW_BLOCK = 2**19  # entries of a tile that are drawn from at once, in cache
ONE, MANTISSA_BITS = 0x3F800000, 23  # of fp32: the bits of 1.0


def tile_draw(tile: Tile, draw: Draw, kept: Kept) -> None:
    """Append the kept entries of one slice of the vocabulary to `kept`, in column order."""
    tile_draw_sum(tile, draw, kept)


def tile_draw_sum(tile: Tile, draw: Draw, kept: Kept) -> Tensor:
    """`tile_draw`, returning the sum of exp(z - anchor) over the slice (n,)."""
    # As the leading bits of the mantissa of a float in [1, 2).
    shift = MANTISSA_BITS - WORD_BITS
    words = draw.column_words[tile.columns] << shift | ONE
    draw = draw._replace(row_words=draw.row_words << shift)
    step = max(1, DRAW_BLOCK // max(1, len(words)))
    sums = [tile.z.new_empty(0)]
    for start in range(0, len(tile.z), step):
        c = slice(start, start + step)
        part = tile._replace(z=tile.z[c], rows=tile.rows[c])
        sums.append(_draw_block(part, words, draw[c], kept[c]))
    return torch.cat(sums)


def _draw_block(tile: Tile, words: Tensor, draw: Draw, kept: Kept) -> Tensor:
    z = tile_logits(tile)
    e = (z - draw.anchor[:, None]).exp_()
    u = (words ^ draw.row_words[:, None]).view(torch.float32).sub_(1.0)
    keep = e > u
    keep[tile_targets(tile)] = False
    row, column = _true(keep)
    taken = torch.bincount(row, minlength=len(z))
    rank = torch.arange(len(row), device=row.device) - (taken.cumsum(0) - taken)[row]
    slot = kept.count[row] + rank
    fits = slot < kept.ids.shape[1]
    row, column, slot = row[fits], column[fits], slot[fits]
    kept.ids[row, slot] = (column + tile.columns.start).to(torch.int32)
    kept.logits[row, slot] = z[row, column]
    kept.count.add_(taken)
    return e.sum(1)


def _true(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column of what is true in keep (n, w): few, so eight are looked at at once."""
    if keep.shape[1] % 8:
        return keep.nonzero().unbind(1)
    row, eight = keep.view(torch.int64).nonzero().unbind(1)
    which, column = keep.unflatten(1, (-1, 8))[row, eight].nonzero().unbind(1)
    return row[which], eight[which] * 8 + column


def entry_logits(
    rows: Rows,
    head: Head,
    entries: Tensor,  # (n, K) int32 columns
    count: Tensor | None,  # (n,) int32: the number of a row's entries; None: all K
    out: Tensor,  # (n, K)
) -> None:
    """Write the logits of some entries of each row to `out`; beyond `count` they are arbitrary."""
    slots = max(entries.shape[1], 1)
    step = max(1, BLOCK // (slots * rows.hidden.shape[1]))
    for start in range(0, len(rows.ids), step):
        c = slice(start, start + step)
        v = entries[c].long()
        if count is not None:
            v = torch.where(torch.arange(slots, device=v.device) < count[c, None], v, 0)
        z = (rows.hidden[c, None].to(out.dtype) * head.weight_rows(v, out.dtype)).sum(-1)
        b = None if head.bias is None else head.bias[v].to(out.dtype)
        out[c] = scaled_logits(z, b, rows[c].inv_temperature, head)


def bag_sum(
    out: Tensor,  # (B, H)
    table: Tensor,  # (M, H)
    index: Tensor,  # (E,) int64
    coef: Tensor,  # (E,)
    bounds: Tensor,  # (B + 1,) int64
) -> None:
    """Add the sum of coef * table[index] over each bag to its row of `out`."""
    if table.dtype == coef.dtype:
        _add_bags(out, table, index, coef, bounds)
        return
    # The table is converted slice by slice; each slice adds its part of every bag.
    total = torch.zeros_like(out, dtype=coef.dtype) if out.dtype != coef.dtype else out
    step = max(1, BLOCK // table.shape[1])
    bag = torch.repeat_interleave(bounds.diff(), output_size=len(index))
    order = (index // step).argsort(stable=True)
    index, coef, bag = index[order], coef[order], bag[order]
    starts = torch.searchsorted(
        index // step, torch.arange(len(table) // step + 2, device=index.device)
    )
    for i, (first, last) in enumerate(pairwise(starts.tolist())):
        if first < last:
            e, rows = slice(first, last), table[i * step : (i + 1) * step].to(coef.dtype)
            edges = torch.searchsorted(bag[e], torch.arange(len(bounds), device=bag.device))
            _add_bags(total, rows, index[e] - i * step, coef[e], edges)
    if total is not out:
        out += total


def sum_by_id(
    out: Tensor,  # (V, H)
    sorted_ids: Tensor,  # (E,) int64, ascending
    table: Tensor,  # (M, H)
    index: Tensor,  # (E,) int64
    coef: Tensor,  # (E,)
) -> None:
    """Add coef * table[index] to the row of `out` that each id names; others are not touched."""
    ids, counts = sorted_ids.unique_consecutive(return_counts=True)
    bounds = F.pad(counts.cumsum(0), (1, 0))
    step = max(1, SUM_BLOCK // out.shape[1])
    for first in range(0, len(ids), step):
        c = slice(first, min(first + step, len(ids)))
        start, stop = bounds[c.start].item(), bounds[c.stop].item()
        part = out.index_select(0, ids[c]).to(coef.dtype)
        edges = bounds[c.start : c.stop + 1] - start
        bag_sum(part, table, index[start:stop], coef[start:stop], edges)
        out.index_copy_(0, ids[c], part.to(out.dtype))


def _add_bags(out: Tensor, table: Tensor, index: Tensor, coef: Tensor, bounds: Tensor) -> None:
    most = max(1, BLOCK // out.shape[1])
    for first in range(0, len(out), most):
        bags = slice(first, min(first + most, len(out)))
        start, stop = bounds[bags.start].item(), bounds[bags.stop].item()
        if start < stop:
            out[bags] += F.embedding_bag(
                index[start:stop], table, bounds[bags.start : bags.stop + 1] - start, mode="sum",
                per_sample_weights=coef[start:stop], include_last_offset=True,
            )  # fmt: skip
