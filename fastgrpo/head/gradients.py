"""Gradients with respect to hidden, weight and bias, accumulated tile by tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.head.plan import Needs, Plan, VocabSlice
from fastgrpo_kernels import Head, Logps, Rows, Upstream

# fp16 holds numbers up to 2^16. An entry of a tile is at most dL/dlogp plus 4 dL/dentropy, times
# dz/dz0: p |log p + entropy| is below 4 with up to a million entries.
FP16_KNOWN = 13  # the largest factor of a row becomes 2^12 to 2^13 where all of them are known
FP16_EXPECTED = -2  # 2^-3 to 2^-2 where they are known up to the ratio


class Grads(NamedTuple):
    """The gradients; None for one that is not needed."""

    hidden: Tensor | None  # (n, H) accumulation dtype
    weight: Tensor | None  # as `Head.trained`, in its dtype; fp32 for fp16
    bias: Tensor | None  # (V,) accumulation dtype


class Scaling(NamedTuple):
    """A power of two that brings the gradients of a pass into the range of its fp16 tiles.

    A loss divides by its number of tokens. A probability times that dL/dlogp is soon below what
    fp16 holds, 6e-8. Gradients are linear in dL/dlogp: `lifted` multiplies it before any tile is
    rounded, and `restored` divides the fp32 sums at the end. Neither rounds anything itself. The
    factors are tensors, so the host does not wait for them.
    """

    up: Tensor | None = None  # () fp32; None: 1, where tiles have the range of fp32
    down: Tensor | None = None  # () fp32: its inverse

    @classmethod
    def known(cls, rows: Rows, head: Head, plan: Plan, upstream: Upstream) -> Scaling:
        """Return the scaling for given upstream gradients, with which no tile overflows."""
        if not plan.fp16_tiles:
            return cls()
        largest = upstream.dlogps.abs()
        if upstream.dentropy is not None:
            largest = torch.maximum(largest, 4 * upstream.dentropy.abs())
        return cls._of(largest * rows.slope(head), FP16_KNOWN)

    @classmethod
    def expected(cls, rows: Rows, head: Head, magnitude: Tensor) -> Scaling:
        """Return the scaling for rows that are not scored yet, from |dL/dlogp| at a ratio of 1.

        A sum over several chunks has one factor, chosen before the first. Two things are lost
        against `known`. Entries beyond 2^18 times the largest magnitude overflow, and gradients are
        not finite: that takes a ratio of 12 nats without a clip. And entries below 2e-7 of the
        largest magnitude become 0, which shows only if it is far above that of most rows.
        """
        return cls._of(magnitude * rows.slope(head), FP16_EXPECTED)

    @classmethod
    def _of(cls, sizes: Tensor, exponent: int) -> Scaling:
        """Return the factor that brings the largest size to half of 2^exponent or more."""
        # What is not finite spoils its own row in any case, and must not spoil the others.
        largest = sizes.abs().nan_to_num(0.0, 0.0, 0.0).amax()
        power = (exponent - torch.frexp(largest).exponent).clamp(-100, 100)
        # Made of its bits: no exp2 has to be exact.
        return cls(*(((x + 127) << 23).view(torch.float32) for x in (power, -power)))

    def lifted(self, upstream: Upstream) -> Upstream:
        """Return upstream gradients as the tiles are made of."""
        if self.up is None:
            return upstream
        return Upstream(*(None if x is None else x * self.up for x in upstream))

    def restored(self, grads: Grads) -> Grads:
        """Undo `lifted` in the gradients, in place."""
        if self.down is not None:
            for grad in grads:
                if grad is not None:
                    grad.mul_(self.down)
        return grads


class Targets(NamedTuple):
    """The target entries of 16-bit gradient tiles, kept in fp32 and out of the GEMMs.

    The other entries are small beside the target's 1 - p. Without it, the rounding error of the
    tile is relative to these small entries.
    """

    coef: Tensor | None = None  # (n,) dL/dz0 at the target; None: the tiles are fp32 and hold it
    sorted_ids: Tensor | None = None  # (n,)
    order: Tensor | None = None  # (n,)

    @classmethod
    def of(cls, rows: Rows, plan: Plan) -> Targets:
        """Return the target entries that `tile_grad` is to write."""
        if not plan.mixed:
            return cls()
        coef = torch.zeros_like(rows.ids, dtype=plan.accumulator)
        return cls(coef, *rows.ids.sort(stable=True))

    @classmethod
    def of_scores(cls, rows: Rows, head: Head, scored: Logps, upstream: Upstream) -> Targets:
        """Return the target entries, computed from the scores: there is no tile of logits."""
        coef = -torch.expm1(scored.logps) * upstream.dlogps * rows.slope(head)
        if head.softcap:
            z = scored.logps + scored.lse
            z = z if rows.inv_temperature is None else z / rows.inv_temperature
            coef *= 1 - (z / head.softcap).square()
        return cls(coef, *rows.ids.sort(stable=True))

    def add_to(self, dhidden: Tensor | None, rows: Rows, head: Head) -> None:
        """Add the target entries' part of dhidden (n, H)."""
        if self.coef is not None and dhidden is not None:
            # An id outside the vocabulary has a coefficient of 0 or NaN: any row will do.
            ids = rows.ids.clamp(0, len(head.weight) - 1)
            dhidden.addcmul_(self.coef[:, None], head.weight_rows(ids, dhidden.dtype))


@dataclass(frozen=True)
class GradSums:
    """Accumulators of the gradients.

    dweight is summed in the accumulation dtype. The sum is in place if that is also its own dtype,
    or if chunks of rows are the outer loop. Otherwise a slice is summed in `scratch` and written
    once.
    """

    plan: Plan
    columns: slice  # of hidden states: those that dweight is a sum of
    dhidden: Tensor | None  # (n, H)
    dweight: Tensor | None  # (V, H)
    dbias: Tensor | None  # (V,)
    scratch: Tensor | None  # (slice_width, H)
    dtype: torch.dtype  # of the resulting dweight

    @classmethod
    def of(cls, rows: Rows, head: Head, plan: Plan, needs: Needs, whole: bool) -> GradSums:
        """Return empty sums; `whole` where dweight is summed over several chunks of rows."""
        weight, dtype = head.trained, plan.accumulator
        # fp16 gradients stay fp32 here: a loss scaler must multiply them before they are rounded.
        final = dtype if weight.dtype == torch.float16 else weight.dtype
        in_place = whole or final == dtype
        new_weight = torch.empty_like if len(rows.ids) else torch.zeros_like
        scratch_shape = (plan.slice_width, weight.shape[1])
        return cls(
            plan,
            head.trained_columns,
            rows.hidden.new_zeros(rows.hidden.shape, dtype=dtype) if needs.hidden else None,
            new_weight(weight, dtype=dtype if in_place else final) if needs.weight else None,
            weight.new_zeros(len(weight), dtype=dtype) if needs.bias else None,
            None if in_place or not needs.weight else weight.new_empty(scratch_shape, dtype=dtype),
            final,
        )

    def dhidden_of(self, c: slice, kept: Tensor | None = None) -> Tensor | None:
        """Return the buffer for dhidden of a chunk, or of the rows of it that are kept."""
        if self.dhidden is None or kept is None:
            return None if self.dhidden is None else self.dhidden[c]
        return self.dhidden.new_empty((len(kept), self.dhidden.shape[1]))

    def store_dhidden(self, c: slice, kept: Tensor | None, dhidden: Tensor | None) -> None:
        """Write dhidden of the kept rows of a chunk to their places."""
        if self.dhidden is not None and kept is not None:
            self.dhidden[c].index_copy_(0, kept, dhidden)

    def add_tile(
        self,
        dz: Tensor,  # (n, Vs) gradient with respect to the raw logits
        part: VocabSlice,
        hidden: Tensor,  # (n, H)
        dhidden: Tensor | None,  # (n, H)
        accumulate: bool,
    ) -> None:
        """Add a tile's gradients; with `accumulate` False the slice of dweight is overwritten."""
        matmul, v = self.plan.kernels.matmul, part.columns
        if dhidden is not None:
            matmul(dhidden, dz, part.weight, accumulate=v.start > 0)
        if self.dweight is not None:
            matmul(self._dweight(v), dz.t(), hidden[:, self.columns], accumulate)
        if self.dbias is not None:
            self.dbias[v].add_(dz.sum(0, dtype=self.dbias.dtype))

    def add_scaled(
        self,
        exps: Tensor,  # (n, Vs) in the operands' dtype
        v: slice,
        scale: Tensor,  # (n,): scale * exps is the gradient with respect to the raw logits
        scaled_hidden: Tensor | None,  # (n, H) in the operands' dtype: scale * hidden
        accumulate: bool,
    ) -> None:
        """Add a slice of exponentials to dweight and dbias, as `add_tile` adds a tile."""
        matmul = self.plan.kernels.matmul
        if self.dweight is not None:
            matmul(self._dweight(v), exps.t(), scaled_hidden[:, self.columns], accumulate)
        if self.dbias is not None:
            # The scale in two parts: where they have 16 bits, the rounding of one would show in a
            # plain sum over rows.
            high = scale.to(exps.dtype)
            parts = torch.stack([high, (scale - high).to(exps.dtype)], 1)
            sums = scale.new_empty((exps.shape[1], 2))
            matmul(sums, exps.t(), parts)
            self.dbias[v].add_(sums.sum(1))

    def add_targets(self, v: slice, hidden: Tensor, targets: Targets) -> None:
        """Add the target entries that lie in a slice of the vocabulary to weight and bias."""
        if targets.coef is None:
            return
        scatter_rows = self.plan.kernels.scatter_rows
        where = (targets.sorted_ids, targets.order, targets.coef)
        if self.dweight is not None:
            scatter_rows(self._dweight(v), *where, hidden[:, self.columns], v.start)
        if self.dbias is not None:
            ones = torch.ones_like(targets.coef)[:, None]
            scatter_rows(self.dbias[v][:, None], *where, ones, v.start)

    def store_with_targets(self, v: slice, hidden: Tensor, targets: Targets) -> None:
        """Complete a slice of dweight, if it was summed in the scratch, and write it."""
        if self.scratch is not None:
            self.add_targets(v, hidden, targets)
            self.store(v)

    def add_all_targets(self, hidden: Tensor, targets: Targets) -> None:
        """Add the target entries that `store_with_targets` did not: of the whole vocabulary.

        A launch has programs for every target, wherever it lies: one is cheaper than one a slice.
        """
        if self.scratch is None:
            self.add_targets(slice(0, None), hidden, targets)

    def store(self, v: slice) -> None:
        """Write a complete slice of dweight, if it was summed in the scratch."""
        if self.scratch is not None:
            self.dweight[v] = self.scratch[: v.stop - v.start]

    def result(self) -> Grads:
        dweight = None if self.dweight is None else self.dweight.to(self.dtype)
        return Grads(self.dhidden, dweight, self.dbias)

    def _dweight(self, v: slice) -> Tensor:
        """Return the buffer in which a slice of dweight is summed."""
        return self.dweight[v] if self.scratch is None else self.scratch[: v.stop - v.start]
