"""Torch twins of `fastgrpo_kernels.entry_softmax`: the softmax over some entries of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.torch_kernels.logit_math import entry_slope, scaled_logits
from fastgrpo_kernels import EntryList, Head, Logps, Rows, Upstream

BLOCK = 2**16  # numbers of a table that are gathered at once, in cache


def entry_dots(
    out: Tensor,  # (E,)
    rows: Tensor,  # (n, H)
    row: Tensor,  # (E,) int64 row of `rows`
    table: Tensor,  # (M, H)
    index: Tensor,  # (E,) int64 row of the table
) -> None:
    """Add the dot product of rows[row] and table[index] to each entry."""
    step = max(1, BLOCK // table.shape[1])
    for start in range(0, len(index), step):
        c = slice(start, start + step)
        gathered = table.index_select(0, index[c]).to(out.dtype)
        out[c] += gathered.mul_(rows.index_select(0, row[c])).sum(1)


def segment_softmax(
    entries: EntryList,
    bounds: Tensor,  # (n + 1,) int64
    rows: Rows,
    head: Head,
    with_entropy: bool,
) -> Logps:
    """Return the scores of rows by the softmax over their entries; z0 becomes z, in place."""
    row, ids, is_target, z = entries
    bias = None if head.bias is None else head.bias[ids, None].to(z.dtype)
    inverse = None if rows.inv_temperature is None else rows.inv_temperature[row]
    z.copy_(scaled_logits(z[:, None], bias, inverse, head)[:, 0])
    top = torch.segment_reduce(z, "max", offsets=bounds)
    # A maximum of -inf cannot be subtracted: any finite one keeps exp() at 0.
    top = top.masked_fill(top == -torch.inf, 0.0)
    centred = z - top[row]
    e = centred.exp().double()
    total = torch.segment_reduce(e, "sum", offsets=bounds)
    log_sum = total.log()
    target = torch.full_like(top, torch.nan)
    found = is_target.nonzero()[:, 0]
    target[row[found]] = centred[found]
    entropy = None
    if with_entropy:
        surprise = torch.segment_reduce(torch.special.entr(e), "sum", offsets=bounds)
        entropy = (log_sum + surprise / total).to(z.dtype)
    log_sum = log_sum.to(z.dtype)
    return Logps(target - log_sum, top + log_sum, entropy)


def entry_grads(
    entries: EntryList,
    rows: Rows,
    head: Head,
    scored: Logps,
    upstream: Upstream,
    inclusion: Tensor | None = None,  # (E,) probability of being there; None: 1
) -> Tensor:
    """Return dL/dz0 (E,) of entries: exact at the target, elsewhere p counts p / inclusion."""
    row, _, is_target, z = entries
    scored, upstream = scored[row], upstream[row]
    inverse = None if rows.inv_temperature is None else rows.inv_temperature[row]
    p = (z - scored.lse).exp()
    weight = p if inclusion is None else torch.where(is_target, p, p / inclusion)
    gradient = torch.where(
        is_target, -torch.expm1(scored.logps) * upstream.dlogps, -weight * upstream.dlogps
    )
    if upstream.dentropy is not None:
        surprise = torch.where(p == 0, 0.0, z - scored.lse + scored.entropy)
        gradient = gradient - upstream.dentropy * weight * surprise
    return gradient * entry_slope(z, inverse, head)
