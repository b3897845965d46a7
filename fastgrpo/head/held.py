"""Three ways of holding a chunk of rows between its scores and its gradients.

    RawLogits             fp32 logits, which `tile_grad` turns into their gradient
    Exponentials          exp(z - anchor) in place of the logits: the gradient is a multiple of it
    AnchoredExponentials  the same in 16 bits; the logits are never in memory

Each has one buffer for all chunks. `score` fills it for some rows, `keep` drops rows that turn out
to have no gradient, and `add_to` adds the gradients of the remaining rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.head.gradients import GradSums, Targets
from fastgrpo.head.plan import Needs, Plan, VocabSlice, chunks, padded
from fastgrpo_kernels import Head, Logps, Rows, RowState, Tile, Upstream

FEW_DEAD = 0.1  # up to this share of rows without gradient, moving the others does not pay
PACKED_AT_ONCE = 256  # rows that move together


class Held(Protocol):
    """A chunk of rows, with what their gradients need from their logits."""

    size: int
    """Rows of a chunk."""
    worth_a_wait: bool
    """Whether dropping rows pays even if the host must wait for the device to find them."""

    def score(self, rows: Rows) -> Logps:
        """Fill the buffer for a chunk of rows and return their scores."""
        ...

    def worth_dropping(self, count: int) -> bool:
        """Whether dropping `count` rows of the chunk pays."""
        ...

    def keep(self, live: Tensor) -> None:
        """Drop all rows of the chunk except these, given in ascending order."""
        ...

    def add_to(
        self, sums: GradSums, dhidden: Tensor | None, upstream: Upstream, accumulate: bool
    ) -> None:
        """Add the gradients of the kept rows; without `accumulate` dweight is overwritten."""
        ...


class RawLogits:
    """All logits of a chunk of rows, turned into their gradient in place."""

    worth_a_wait = False

    def __init__(self, rows: Rows, head: Head, plan: Plan, with_entropy: bool) -> None:
        self.head, self.plan, self.with_entropy = head, plan, with_entropy
        self.size = plan.chunk
        most = min(self.size, len(rows.ids))
        self._buffer = plan.new_tile(most, len(head.weight), rows.hidden.device)

    def score(self, rows: Rows) -> Logps:
        self._rows, self._live = rows, None
        self._hidden = rows.hidden.to(self.plan.operand)
        self._z = self._buffer[: len(rows.ids)]
        state = RowState.start(rows, self.plan.accumulator)
        for tile, part in self._tiles():
            self.plan.kernels.matmul(tile.z, self._hidden, part.weight.t())
            self._fold(tile, state)
        self._scored = state.finish(self.with_entropy)
        return self._scored

    def worth_dropping(self, count: int) -> bool:
        return count > 0

    def keep(self, live: Tensor) -> None:
        self._live, self._rows = live, self._rows[live]
        self._hidden, self._scored = self._hidden[live], self._scored[live]

    def add_to(
        self, sums: GradSums, dhidden: Tensor | None, upstream: Upstream, accumulate: bool
    ) -> None:
        targets = Targets.of(self._rows, self.plan)
        for tile, part in self._tiles():
            dz = self._gradient(tile, upstream, targets)
            sums.add_tile(dz, part, self._hidden, dhidden, accumulate)
            sums.store_with_targets(part.columns, self._hidden, targets)
            del tile, part, dz  # before the next slice of the weight and of the rows is made
        sums.add_all_targets(self._hidden, targets)
        targets.add_to(dhidden, self._rows, self.head)

    def _tiles(self) -> Iterator[tuple[Tile, VocabSlice]]:
        """Yield the chunk slice by slice, without the dropped rows."""
        for part in self.plan.slices(self.head, self.plan.chunk_width):
            z = self._z[:, part.columns]
            z = z if self._live is None else z.index_select(0, self._live)
            yield Tile(z, part.columns, part.bias, self._rows, self.head), part
            del z, part

    def _fold(self, tile: Tile, state: RowState) -> None:
        self.plan.kernels.tile_stats(tile, state, self.with_entropy)

    def _gradient(self, tile: Tile, upstream: Upstream, targets: Targets) -> Tensor:
        return tile_gradient(tile, self.plan, self._scored, upstream, targets)


class Exponentials(RawLogits):
    """exp(z - anchor) in place of the logits, with an anchor per row and slice.

    Without a softcap or an entropy term, the gradient needs nothing else that is vocabulary-sized.
    """

    @staticmethod
    def suit(head: Head, plan: Plan, with_entropy: bool) -> bool:
        able = plan.kernels.tile_exp is not None
        return able and not (with_entropy or head.softcap or plan.mixed)

    def score(self, rows: Rows) -> Logps:
        self._anchors: dict[int, Tensor] = {}
        return super().score(rows)

    def keep(self, live: Tensor) -> None:
        super().keep(live)
        self._anchors = {start: anchor[live] for start, anchor in self._anchors.items()}

    def _fold(self, tile: Tile, state: RowState) -> None:
        self._anchors[tile.columns.start] = self.plan.kernels.tile_exp(tile, state)

    def _gradient(self, tile: Tile, upstream: Upstream, targets: Targets) -> Tensor:
        anchor = self._anchors[tile.columns.start]
        self.plan.kernels.tile_exp_grad(tile, anchor, self._scored, upstream)
        return tile.z


class AnchoredExponentials:
    """16-bit exp(z - anchor), computed by one kernel together with the scores.

    dL/dz0_v is scale * exp(z_v - anchor) for every v except the target, with one scale per row.
    """

    worth_a_wait = True

    def __init__(
        self, rows: Rows, head: Head, plan: Plan, with_entropy: bool, needs: Needs
    ) -> None:
        self.head, self.plan, self.with_entropy, self.needs = head, plan, with_entropy, needs
        self.size = plan.exps_chunk(len(rows.ids), head, needs)
        vocab = len(head.weight)
        self._buffer = rows.hidden.new_empty((self.size, padded(vocab)))[:, :vocab]

    @staticmethod
    def suit(rows: Rows, head: Head, plan: Plan) -> bool:
        """Whether it applies: bf16 (fp16 would overflow), and GEMMs with fp32 results."""
        bf16 = rows.hidden.dtype == torch.bfloat16 and plan.mixed and len(rows.ids) > 0
        return bf16 and plan.uses_anchored(rows, head)

    def score(self, rows: Rows) -> Logps:
        self._rows, self._exps = rows, self._buffer[: len(rows.ids)]
        result = self.plan.kernels.anchored_logps_fwd(
            rows, self.head, self.with_entropy, exps=self._exps
        )
        self._scored, self._log_scale = result.scored, result.log_scale
        return self._scored

    def worth_dropping(self, count: int) -> bool:
        return count > FEW_DEAD * len(self._rows.ids)

    def keep(self, live: Tensor) -> None:
        self._rows, self._scored = self._rows[live], self._scored[live]
        self._log_scale = self._log_scale[live]
        for c in chunks(len(live), PACKED_AT_ONCE):
            # Row i comes from row live[i] >= i, so no row is overwritten before it is moved.
            self._exps[c] = self._exps.index_select(0, live[c])
        self._exps = self._exps[: len(live)]

    def add_to(
        self, sums: GradSums, dhidden: Tensor | None, upstream: Upstream, accumulate: bool
    ) -> None:
        rows, head, exps = self._rows, self.head, self._exps
        scale = -upstream.dlogps * self._log_scale.exp() * rows.slope(head)
        targets = Targets.of_scores(rows, head, self._scored, upstream)
        if dhidden is not None:
            self.plan.kernels.matmul(dhidden, exps, head.weight)
            dhidden.mul_(scale[:, None])
            targets.add_to(dhidden, rows, head)
        if not (self.needs.weight or self.needs.bias):
            return
        scaled = (rows.hidden * scale[:, None]).to(self.plan.operand) if self.needs.weight else None
        for v in chunks(len(head.weight), self.plan.chunk_width):
            sums.add_exps(exps[:, v], v, scale, scaled, accumulate)
            sums.store_with_targets(v, rows.hidden, targets)
        sums.add_all_targets(rows.hidden, targets)


def tile_gradient(
    tile: Tile, plan: Plan, scored: Logps, upstream: Upstream, targets: Targets
) -> Tensor:
    """Turn a tile of logits into its gradient: in place, or in a 16-bit tile for the GEMMs."""
    dz = tile.z if targets.coef is None else torch.empty_like(tile.z, dtype=plan.operand)
    plan.kernels.tile_grad(tile, scored, upstream, dz, targets.coef)
    return dz
