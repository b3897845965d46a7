"""Three ways of holding a chunk of rows between its scores and its gradients.

    RawLogits             fp32 logits, which `tile_grad` turns into their gradient
    Probabilities         in place of the logits: the gradient is a multiple of them
    AnchoredExponentials  the same but for a factor, in 16 bits; the logits are never in memory

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

    def keep(self, live: Tensor) -> Tensor:
        """Drop all rows of the chunk except these, given in ascending order.

        Return them in the order in which they are now.
        """
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
        self._begin(rows)
        state = RowState.start(rows, self.plan.accumulator)
        for tile, part in self._tiles():
            self.plan.kernels.matmul(tile.z, self._hidden, part.weight.t())
            self.plan.kernels.tile_stats(tile, state, self.with_entropy)
        self._scored = state.finish(self.with_entropy)
        return self._scored

    def worth_dropping(self, count: int) -> bool:
        return count > 0

    def keep(self, live: Tensor) -> Tensor:
        order = _close_gaps(self._z, live)
        self._z = self._z[: len(live)]
        self._rows, self._scored = self._rows[order], self._scored[order]
        self._hidden = self._hidden[order]
        return order

    def add_to(
        self, sums: GradSums, dhidden: Tensor | None, upstream: Upstream, accumulate: bool
    ) -> None:
        targets = Targets.of(self._rows, self.plan)
        for tile, part in self._tiles():
            dz = tile_gradient(tile, self.plan, self._scored, upstream, targets)
            sums.add_tile(dz, part, self._hidden, dhidden, accumulate)
            sums.store_with_targets(part.columns, self._hidden, targets)
            del tile, part, dz  # before the next slice of the weight is made
        sums.add_all_targets(self._hidden, targets)
        targets.add_to(dhidden, self._rows, self.head)

    def _begin(self, rows: Rows) -> None:
        self._rows, self._hidden = rows, rows.hidden.to(self.plan.operand)
        self._z = self._buffer[: len(rows.ids)]

    def _tiles(self) -> Iterator[tuple[Tile, VocabSlice]]:
        """Yield the chunk slice by slice."""
        for part in self.plan.slices(self.head, self.plan.chunk_width):
            z = self._z[:, part.columns]
            yield Tile(z, part.columns, part.bias, self._rows, self.head), part
            del part


class Probabilities(RawLogits):
    """Probabilities in place of the logits, as one softmax leaves them: up to a factor near 1.

    Without a softcap or an entropy term, the gradient with respect to the logits of a row is a
    multiple of p - [v = y]. The factor goes into the other operand of each GEMM.
    """

    @staticmethod
    def suit(head: Head, plan: Plan) -> bool:
        """Whether it applies: fp32 operands, where the host does not wait for the device."""
        able = plan.kernels.tile_softmax is not None
        return able and not (head.softcap or plan.mixed or plan.sync_stalls)

    def score(self, rows: Rows) -> Logps:
        self._begin(rows)
        slope = torch.as_tensor(rows.slope(self.head), dtype=self._z.dtype)
        slope = slope.expand(len(rows.ids))[:, None]
        scaled = self._hidden if bool((slope == 1).all()) else self._hidden * slope
        for tile, part in self._tiles():
            self.plan.kernels.matmul(tile.z, scaled, part.weight.t())
            if part.bias is not None:
                tile.z.addcmul_(part.bias, slope)
        whole = Tile(self._z, slice(0, self._z.shape[1]), None, rows, self.head)
        self._scored, self._total = self.plan.kernels.tile_softmax(whole, self.with_entropy)
        return self._scored

    def keep(self, live: Tensor) -> Tensor:
        order = super().keep(live)
        self._total = self._total[order]
        return order

    def add_to(
        self, sums: GradSums, dhidden: Tensor | None, upstream: Upstream, accumulate: bool
    ) -> None:
        ids = self._rows.ids.clamp(0, self._z.shape[1] - 1)
        # p - 1 at the target, from its log-prob.
        target = torch.expm1(self._scored.logps) * self._total
        self._z.scatter_(1, ids[:, None], target[:, None])
        scale = -upstream.dlogps / self._total * self._rows.slope(self.head)
        scaled = None if sums.dweight is None else self._hidden * scale[:, None]
        for tile, part in self._tiles():
            if dhidden is not None:
                accumulates = part.columns.start > 0
                self.plan.kernels.matmul(dhidden, tile.z, part.weight, accumulates)
            sums.add_scaled(tile.z, part.columns, scale, scaled, accumulate)
            sums.store(part.columns)
            del tile, part  # before the next slice of the weight is made
        if dhidden is not None:
            dhidden.mul_(scale[:, None])


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

    def keep(self, live: Tensor) -> Tensor:
        self._rows, self._scored = self._rows[live], self._scored[live]
        self._log_scale = self._log_scale[live]
        for c in chunks(len(live), PACKED_AT_ONCE):
            # Row i comes from row live[i] >= i, so no row is overwritten before it is moved.
            self._exps[c] = self._exps.index_select(0, live[c])
        self._exps = self._exps[: len(live)]
        return live

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
            sums.add_scaled(exps[:, v], v, scale, scaled, accumulate)
            sums.store_with_targets(v, rows.hidden, targets)
        sums.add_all_targets(rows.hidden, targets)


def tile_gradient(
    tile: Tile, plan: Plan, scored: Logps, upstream: Upstream, targets: Targets
) -> Tensor:
    """Turn a tile of logits into its gradient: in place, or in a 16-bit tile for the GEMMs."""
    dz = tile.z if targets.coef is None else torch.empty_like(tile.z, dtype=plan.operand)
    plan.kernels.tile_grad(tile, scored, upstream, dz, targets.coef)
    return dz


def _close_gaps(z: Tensor, live: Tensor) -> Tensor:
    """Move live rows of z from its end to where rows are dead, and return them in their new order.

    Row by row: no copy of many rows is made.
    """
    order = torch.arange(len(live), device=live.device)
    late = live[live >= len(live)]
    gaps = torch.ones_like(order, dtype=torch.bool)
    gaps[live[: len(live) - len(late)]] = False
    order[gaps] = late
    for gap, row in zip(gaps.nonzero()[:, 0].tolist(), late.tolist(), strict=True):
        z[gap] = z[row]
    return order
