"""Log-probs over what the sampler could have drawn: a softmax over a few ids of each row.

    logp      z_y - logsumexp of z over the row's entries, one for each of its kept ids
    dz_e      dL/dlogp ([e = y] - p_e), and an entropy term
    dhidden   of a row, the sum of dz_e W_e over its entries
    dweight   of an id, the sum of dz_e h over the entries that have it

So a row reads as many rows of the weight as it has entries. Beyond 1/`GEMM_SHARE` of the vocabulary
a GEMM is cheaper: the entries are then taken from tiles of logits, and their gradients are tiles
with zeros between them. A row without entries has the whole vocabulary, and takes the dense loops.
All three add to the same dweight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgrpo.head import loops
from fastgrpo.head.entries import entry_gradients
from fastgrpo.head.gradients import Grads, GradSums
from fastgrpo.head.plan import Needs, Plan, VocabSlice, chunks
from fastgrpo.packing import entries_of, rows_of_entries, spread
from fastgrpo.torch_kernels.logit_math import scaled_logits
from fastgrpo.torch_kernels.sparse_entries import bag_dot
from fastgrpo_kernels import Head, Logps, Rows, Upstream

SUM_BLOCK = 2**18  # numbers of dweight that are summed at once, in cache
GEMM_SHARE = 32  # entries of a GEMM's result that take as long as one of a gathered row


class Kept(NamedTuple):
    """The kept ids of rows, row after row."""

    ids: Tensor  # (E,) int64
    cu: Tensor  # (n + 1,) int64: row i has the entries cu[i] to cu[i + 1]
    values: Tensor | None = None  # (E,) of the entries: z, or dL/dz0

    def __getitem__(self, index: slice | Tensor) -> Kept:  # type: ignore[override]
        entries, cu = entries_of(self.cu, index)
        return Kept(self.ids[entries], cu, None if self.values is None else self.values[entries])

    def within(self, vocab: int) -> Kept:
        """Return the same with every id in [0, vocab), so that none reads beyond the weight."""
        return self._replace(ids=self.ids.clamp(0, vocab - 1))

    def row(self) -> Tensor:
        """Return the row (E,) of each entry."""
        return rows_of_entries(self.cu)

    def is_target(self, rows: Rows) -> Tensor:
        """Return which entries (E,) bool are the target of their row."""
        return self.ids == rows.ids[self.row()]

    def whole(self) -> Tensor:
        """Return the rows with the whole vocabulary."""
        return (self.cu.diff() == 0).nonzero()[:, 0]

    def few(self, vocab: int, least: int) -> Tensor:
        """Return the rows with at least `least` entries, and not many."""
        counts = self.cu.diff()
        return ((counts >= least) & (counts * GEMM_SHARE <= vocab)).nonzero()[:, 0]

    def many(self, vocab: int) -> Tensor:
        """Return the rows whose entries are worth a GEMM."""
        return (self.cu.diff() * GEMM_SHARE > vocab).nonzero()[:, 0]


def logps_fwd(
    rows: Rows, head: Head, plan: Plan, kept: Kept, with_entropy: bool
) -> tuple[Logps, Tensor]:
    """Return the scores of rows, and z of their entries (E,)."""
    vocab, row, is_target = len(head.weight), kept.row(), kept.is_target(rows)
    foreign = (kept.ids < 0) | (kept.ids >= vocab)
    kept = kept.within(vocab)
    z = torch.zeros_like(kept.ids, dtype=plan.accumulator)
    for some, dots in ((kept.few(vocab, 1), _gathered_dots), (kept.many(vocab), _tiled_dots)):
        if len(some):
            entries, cu = entries_of(kept.cu, some)
            z[entries] = dots(rows[some], head, plan, Kept(kept.ids[entries], cu))
    bias = None if head.bias is None else head.bias[kept.ids, None].to(z.dtype)
    inverse = None if rows.inv_temperature is None else rows.inv_temperature[row]
    z = scaled_logits(z[:, None], bias, inverse, head)[:, 0].masked_fill(foreign, torch.nan)
    scored = _softmax(z, kept.cu, row, is_target, with_entropy)
    whole = kept.whole()
    if len(whole):
        dense = loops.logps_fwd(rows[whole], head, plan, with_entropy)
        for mine, other in zip(scored, dense, strict=True):
            if mine is not None:
                mine[whole] = other
    return scored, z


def logps_bwd(
    rows: Rows,
    head: Head,
    plan: Plan,
    kept: Kept,  # with z
    scored: Logps,
    upstream: Upstream,
    needs: Needs,
) -> Grads:
    """Return the gradients. A row with one entry has none."""
    n, vocab, row = len(rows.ids), len(head.weight), kept.row()
    whole, many, few = kept.whole(), kept.many(vocab), kept.few(vocab, 2)
    # Rows of one kind sum dweight slice by slice, and round it once; those of several in one sum.
    several = sum(len(some) > 0 for some in (whole, many, few)) > 1
    sums = GradSums.of(rows[whole], head, plan, needs, whole=several)
    loops.write_gradients(sums, rows[whole], head, plan, scored[whole], upstream[whole])
    dhidden = spread(sums.dhidden, whole, n)
    inverse = None if rows.inv_temperature is None else rows.inv_temperature[row]
    dz0 = entry_gradients(
        kept.values, kept.is_target(rows), inverse, head, scored[row], upstream[row]
    )
    kept = kept.within(vocab)._replace(values=dz0)
    for some, add in ((many, _add_tiles), (few, add_gathered)):
        if len(some):
            part = add(sums, rows[some], head, plan, kept[some])
            if needs.hidden:
                dhidden[some] = part
    if needs.bias:
        add_by_id(sums.dbias[:, None], dz0.new_ones((n, 1)), kept, plan)
    return sums.result()._replace(hidden=dhidden)


def _softmax(
    z: Tensor,  # (E,)
    cu: Tensor,  # (n + 1,)
    row: Tensor,  # (E,)
    is_target: Tensor,  # (E,) bool
    with_entropy: bool,
) -> Logps:
    """Return the scores of rows with entries; NaN where none of them is the target."""
    top = torch.segment_reduce(z, "max", offsets=cu)
    # A maximum of -inf cannot be subtracted: any finite one keeps exp() at 0.
    top = top.masked_fill(top == -torch.inf, 0.0)
    centred = z - top[row]
    e = centred.exp().double()
    total = torch.segment_reduce(e, "sum", offsets=cu)
    log_sum = total.log()
    target = torch.full_like(top, torch.nan)
    found = is_target.nonzero()[:, 0]
    target[row[found]] = centred[found]
    entropy = None
    if with_entropy:
        surprise = torch.segment_reduce(torch.special.entr(e), "sum", offsets=cu)
        entropy = (log_sum + surprise / total).to(z.dtype)
    log_sum = log_sum.to(z.dtype)
    return Logps(target - log_sum, top + log_sum, entropy)


# ---- few entries: rows of the weight, read one by one ------------------------------------------


def _gathered_dots(rows: Rows, head: Head, plan: Plan, kept: Kept) -> Tensor:
    """Return h W_e (E,) of the entries."""
    dots = torch.zeros_like(kept.ids, dtype=plan.accumulator)
    for table, columns in _tables(head):
        bag_dot(dots, rows.hidden[:, columns], table, kept.ids, kept.cu)
    return dots


def add_gathered(sums: GradSums, rows: Rows, head: Head, plan: Plan, kept: Kept) -> Tensor | None:
    """Add to the weight's gradient, and return that of hidden (n, H)."""
    if sums.dweight is not None:
        hidden = rows.hidden[:, head.trained_columns].to(plan.accumulator)
        add_by_id(sums.dweight, hidden, kept, plan)
    if sums.dhidden is None:
        return None
    dhidden = kept.values.new_zeros(rows.hidden.shape)
    for table, columns in _tables(head):
        plan.kernels.bag_sum(dhidden[:, columns], table, kept.ids, kept.values, kept.cu)
    return dhidden


def _tables(head: Head) -> list[tuple[Tensor, slice]]:
    """Return the matrices that a row of the weight is put together of, and their columns."""
    hidden_size = head.weight.shape[1]
    tables = [(head.weight, slice(0, hidden_size))]
    return tables if head.lora is None else [*tables, (head.lora, slice(hidden_size, None))]


def add_by_id(sums: Tensor, table: Tensor, kept: Kept, plan: Plan) -> None:
    """Add to the row of `sums` of each id its entries' values, times their rows of `table`."""
    order = kept.ids.argsort(stable=True)
    ids, counts = kept.ids[order].unique_consecutive(return_counts=True)
    row, values, bounds = kept.row()[order], kept.values[order], pad(counts.cumsum(0), (1, 0))
    for c in chunks(len(ids), max(1, SUM_BLOCK // sums.shape[1])):
        start, stop = bounds[c.start].item(), bounds[c.stop].item()
        part = sums.index_select(0, ids[c]).to(values.dtype)
        plan.kernels.bag_sum(
            part, table, row[start:stop], values[start:stop], bounds[c.start : c.stop + 1] - start
        )
        sums.index_copy_(0, ids[c], part.to(sums.dtype))


# ---- many entries: tiles of logits -------------------------------------------------------------


class _Part(NamedTuple):
    """The entries of a chunk of rows in a slice of the vocabulary."""

    rows: slice
    entries: Tensor  # (E',) which they are
    place: tuple[Tensor, Tensor]  # (E',) row and column in the tile


def _tiled_dots(rows: Rows, head: Head, plan: Plan, kept: Kept) -> Tensor:
    """Return h W_e (E,) of the entries."""
    plan = plan._replace(operand=plan.accumulator)
    hidden, dots = rows.hidden.to(plan.operand), torch.zeros_like(kept.ids, dtype=plan.accumulator)
    for part, tile, tiles in _slices(rows, head, plan, kept):
        for some in tiles:
            z = tile[: some.rows.stop - some.rows.start]
            plan.kernels.matmul(z, hidden[some.rows], part.weight.t())
            dots[some.entries] = z[some.place]
    return dots


def _add_tiles(sums: GradSums, rows: Rows, head: Head, plan: Plan, kept: Kept) -> Tensor | None:
    """Add to the weight's gradient, and return that of hidden (n, H)."""
    plan = plan._replace(operand=plan.accumulator)
    hidden, matmul = rows.hidden.to(plan.operand), plan.kernels.matmul
    dhidden = None if sums.dhidden is None else torch.zeros_like(hidden)
    for part, tile, tiles in _slices(rows, head, plan, kept):
        dweight = None
        if sums.dweight is not None:
            dweight = sums.dweight[part.columns].to(plan.accumulator)
        for some in tiles:
            dz0 = tile[: some.rows.stop - some.rows.start].zero_()
            dz0[some.place] = kept.values[some.entries]
            if dhidden is not None:
                matmul(dhidden[some.rows], dz0, part.weight, accumulate=True)
            if dweight is not None:
                columns = hidden[some.rows, head.trained_columns]
                matmul(dweight, dz0.t(), columns, accumulate=True)
        if dweight is not None:
            sums.dweight[part.columns] = dweight
    return dhidden


def _slices(
    rows: Rows, head: Head, plan: Plan, kept: Kept
) -> Iterator[tuple[VocabSlice, Tensor, list[_Part]]]:
    """Yield the vocabulary slice by slice, a tile to work in, and where the entries lie in it."""
    n, row = len(rows.ids), kept.row()
    width = min(plan.slice_width, len(head.weight))
    buffer = plan.new_tile(min(n, plan.slice_rows), width, row.device)
    for part in plan.slices(head, width):
        v = part.columns
        inside = ((kept.ids >= v.start) & (kept.ids < v.stop)).nonzero()[:, 0]
        where = row[inside]
        parts = []
        for c in chunks(n, plan.slice_rows):
            some = slice(*torch.searchsorted(where, where.new_tensor([c.start, c.stop])).tolist())
            entries = inside[some]
            place = where[some] - c.start, kept.ids[entries] - v.start
            parts.append(_Part(c, entries, place))
        yield part, buffer[:, : v.stop - v.start], parts
