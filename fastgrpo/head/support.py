"""Log-probs over what the sampler could have drawn: a softmax over a few ids of each row.

    logp      z_y - logsumexp of z over the row's entries, one for each of its kept ids
    dz_e      dL/dlogp ([e = y] - p_e), and an entropy term
    dhidden   of a row, the sum of dz_e W_e over its entries
    dweight   of an id, the sum of dz_e h over the entries that have it

So a row reads as many rows of the weight as it has entries. Beyond 1/`GEMM_SHARE` of the vocabulary
a GEMM is cheaper: the entries are then taken from tiles of logits, and their gradients are tiles
with zeros between them. A row without entries has the whole vocabulary, and takes the dense loops.
All three add to the same dweight.

The host waits for the numbers of rows of each kind, once a pass, and for the number of their
entries, once for each kind unless all rows are of it. Tiles of logits make it wait for where the
entries lie in each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.head import loops
from fastgrpo.head.gradients import Grads, GradSums
from fastgrpo.head.plan import Needs, Plan, VocabSlice, chunks
from fastgrpo.packing import Index, entries_of, rows_of_entries, spread
from fastgrpo_kernels import EntryList, Head, Logps, Rows, Upstream

GEMM_SHARE = 48  # entries of a GEMM's result that take as long as one of a gathered row


class Kind(NamedTuple):
    """Rows that go the same way."""

    rows: Index
    count: int


class Kept(NamedTuple):
    """The kept ids of rows, row after row."""

    ids: Tensor  # (E,) int64
    cu: Tensor  # (n + 1,) int64: row i has the entries cu[i] to cu[i + 1]
    values: Tensor | None = None  # (E,) of the entries: z, or dL/dz0

    def __getitem__(self, index: Index) -> Kept:  # type: ignore[override]
        entries, cu = entries_of(self.cu, index)
        return Kept(self.ids[entries], cu, None if self.values is None else self.values[entries])

    def row(self) -> Tensor:
        """Return the row (E,) of each entry."""
        return rows_of_entries(self.cu, len(self.ids))

    def listed(self, rows: Rows, vocab: int, values: Tensor) -> EntryList:
        """Return the entries with these values, every id in [0, vocab): none reads beyond W."""
        row = self.row()
        return EntryList(row, self.ids.clamp(0, vocab - 1), self.ids == rows.ids[row], values)

    def kinds(self, vocab: int, least: int) -> tuple[Kind, Kind, Kind]:
        """Return the rows with the whole vocabulary, with few entries, and with many.

        Rows with fewer than `least` entries, but any, are of no kind. One host synchronisation.
        """
        counts = self.cu.diff()
        kind = torch.where(counts * GEMM_SHARE > vocab, 2, 1)
        kind = kind.masked_fill(counts < least, 3).masked_fill(counts == 0, 0)
        sizes = torch.stack([(kind == k).sum() for k in range(3)]).tolist()
        order = kind.argsort(stable=True)
        whole, few, many, _ = order.split([*sizes, len(counts) - sum(sizes)])
        every = slice(None)
        return tuple(
            Kind(every if len(some) == len(counts) else some, len(some))
            for some in (whole, few, many)
        )


def logps_fwd(
    rows: Rows, head: Head, plan: Plan, kept: Kept, with_entropy: bool
) -> tuple[Logps, Tensor]:
    """Return the scores of rows, and z of their entries (E,)."""
    vocab = len(head.weight)
    z = kept.ids.new_zeros(len(kept.ids), dtype=plan.accumulator)
    entries = kept.listed(rows, vocab, z)
    whole, few, many = kept.kinds(vocab, 1)
    for some, dots in ((few, _gathered_dots), (many, _tiled_dots)):
        if some.count:
            where, cu = entries_of(kept.cu, some.rows)
            z[where] = dots(rows[some.rows], head, plan, Kept(entries.ids[where], cu))
    z.masked_fill_(kept.ids != entries.ids, torch.nan)  # beyond the vocabulary
    scored = plan.kernels.segment_softmax(entries, kept.cu, rows, head, with_entropy)
    if whole.count:
        dense = loops.logps_fwd(rows[whole.rows], head, plan, with_entropy)
        for mine, other in zip(scored, dense, strict=True):
            if mine is not None:
                mine[whole.rows] = other
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
    n, vocab = len(rows.ids), len(head.weight)
    whole, few, many = kept.kinds(vocab, 2)
    # Rows of one kind sum dweight slice by slice, and round it once; those of several in one sum.
    several = sum(kind.count > 0 for kind in (whole, few, many)) > 1
    sums = GradSums.of(rows[whole.rows], head, plan, needs, whole=several)
    loops.write_gradients(
        sums, rows[whole.rows], head, plan, scored[whole.rows], upstream[whole.rows]
    )
    dhidden = spread(sums.dhidden, whole.rows, n)
    entries = kept.listed(rows, vocab, kept.values)
    dz0 = plan.kernels.entry_grads(entries, rows, head, scored, upstream)
    kept = kept._replace(ids=entries.ids, values=dz0)
    for some, add in ((many, _add_tiles), (few, add_gathered)):
        if some.count:
            part = add(sums, rows[some.rows], head, plan, kept[some.rows])
            if needs.hidden:
                dhidden[some.rows] = part
    if needs.bias:
        add_by_id(sums.dbias[:, None], dz0.new_ones((n, 1)), kept, plan)
    return sums.result()._replace(hidden=dhidden)


# ---- few entries: rows of the weight, read one by one ------------------------------------------


def _gathered_dots(rows: Rows, head: Head, plan: Plan, kept: Kept) -> Tensor:
    """Return h W_e (E,) of the entries."""
    row, dots = kept.row(), torch.zeros_like(kept.ids, dtype=plan.accumulator)
    for table, columns in _tables(head):
        plan.kernels.entry_dots(dots, rows.hidden[:, columns], row, table, kept.ids)
    return dots


def add_gathered(sums: GradSums, rows: Rows, head: Head, plan: Plan, kept: Kept) -> Tensor | None:
    """Add to the weight's gradient, and return that of hidden (n, H)."""
    if sums.dweight is not None:
        hidden = rows.hidden[:, head.trained_columns].to(plan.operand)
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
    plan.kernels.sum_by_id(sums, kept.ids[order], table, kept.row()[order], kept.values[order])


# ---- many entries: tiles of logits -------------------------------------------------------------


class _Part(NamedTuple):
    """The entries of a chunk of rows in a slice of the vocabulary."""

    rows: slice
    entries: Tensor  # (E',) which they are
    place: tuple[Tensor, Tensor]  # (E',) row and column in the tile


def _tiled_dots(rows: Rows, head: Head, plan: Plan, kept: Kept) -> Tensor:
    """Return h W_e (E,) of the entries."""
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
