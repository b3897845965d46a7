"""Torch twins of `fastgrpo_kernels.sparse_entries`: the entries that a sparse backward keeps."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.torch_kernels.logit_math import scaled_logits, targets
from fastgrpo_kernels import WORD_BITS, Kept

BLOCK = 2**22  # numbers of a gathered or summed block


def tile_draw(
    z: Tensor,  # (n, Vs) fp32 | fp64 raw logits of the slice; left as they are
    ids: Tensor,  # (n,) int64
    vocab_start: int,
    bias: Tensor | None,  # (Vs,)
    inv_temperature: Tensor | None,  # (n,), None = 1
    logit_scale: float,
    softcap: float,
    anchor: Tensor,  # (n,)
    column_words: Tensor,  # (Vs,) int32
    row_words: Tensor,  # (n,) int32
    kept: Kept,
) -> None:
    """Add the entries that a slice of the vocabulary keeps to `kept`, by column."""
    z = scaled_logits(z, bias, inv_temperature, logit_scale, softcap)
    # Column by column, as the GEMM wrote the tile.
    e = (z.t() - anchor).exp_().mul_(2**WORD_BITS)
    keep = (e > column_words[:, None] ^ row_words).t().contiguous()
    keep[targets(ids, vocab_start, z.shape[1])] = False
    row, column = keep.nonzero().unbind(1)
    taken = torch.bincount(row, minlength=len(ids))
    rank = torch.arange(len(row), device=row.device) - (taken.cumsum(0) - taken)[row]
    slot = kept.count[row] + rank
    fits = slot < kept.ids.shape[1]
    row, column, slot = row[fits], column[fits], slot[fits]
    kept.ids[row, slot] = (column + vocab_start).to(torch.int32)
    kept.logits[row, slot] = z[row, column]
    kept.count.add_(taken)


def entry_logits(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    inv_temperature: Tensor | None,  # (n,), None = 1
    logit_scale: float,
    softcap: float,
    entries: Tensor,  # (n, K) int32
    count: Tensor | None,  # (n,) int32, None = all
    out: Tensor,  # (n, K)
) -> None:
    """Write the logits of some entries of each row to `out`; beyond `count` anything may follow."""
    slots = max(entries.shape[1], 1)
    step = max(1, BLOCK // (slots * hidden.shape[1]))
    for start in range(0, len(hidden), step):
        c = slice(start, start + step)
        v = entries[c].long()
        if count is not None:
            v = torch.where(torch.arange(slots, device=v.device) < count[c, None], v, 0)
        z = (hidden[c, None].to(out.dtype) * weight[v].to(out.dtype)).sum(-1)
        b = None if bias is None else bias[v].to(out.dtype)
        t = None if inv_temperature is None else inv_temperature[c]
        out[c] = scaled_logits(z, b, t, logit_scale, softcap)


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
    # A slice of the table after the other is converted, and adds what the bags take from it.
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
