"""The gradients of hidden, weight and bias while they grow, tile by tile."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.head.plan import Grads, Head, Logps, Needs, Plan, Rows, Upstream


class Targets(NamedTuple):
    """The target entries of 16-bit gradient tiles, kept in fp32 and out of the GEMMs.

    Next to the target's 1 - p the others are small: rounded alone, they keep their own precision.
    """

    coef: Tensor | None = None  # (n,) dL/dz0 at the target; None: the tiles are fp32 and hold it
    sorted_ids: Tensor | None = None  # (n,)
    order: Tensor | None = None  # (n,)

    @classmethod
    def of(cls, rows: Rows, plan: Plan) -> Targets:
        if not plan.mixed:
            return cls()
        coef = torch.zeros_like(rows.ids, dtype=plan.accumulator)
        return cls(coef, *rows.ids.sort(stable=True))

    @classmethod
    def of_scores(cls, rows: Rows, head: Head, scored: Logps, upstream: Upstream) -> Targets:
        """Return the target entries where there is no tile of logits to find them in."""
        coef = -torch.expm1(scored.logps) * upstream.dlogps * rows.slope(head)
        if head.softcap:
            z = scored.logps + scored.lse
            z = z if rows.inv_temperature is None else z / rows.inv_temperature
            coef *= 1 - (z / head.softcap).square()
        return cls(coef, *rows.ids.sort(stable=True))

    def add_to(self, dhidden: Tensor | None, rows: Rows, head: Head) -> None:
        if self.coef is not None and dhidden is not None:
            dhidden.addcmul_(self.coef[:, None], head.weight[rows.ids].to(dhidden.dtype))


class GradSums(NamedTuple):
    """The gradients while they grow.

    dweight is summed in the accumulation dtype: in place where that is its dtype or where chunks of
    rows are the outer loop, otherwise in a scratch of one slice, which is then written once.
    """

    dhidden: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    scratch: Tensor | None
    dtype: torch.dtype  # of the dweight that is asked for

    @classmethod
    def of(cls, rows: Rows, head: Head, plan: Plan, needs: Needs, whole: bool) -> GradSums:
        weight, dtype = head.weight, plan.accumulator
        # A loss scaler's upstream gradient must reach fp16 gradients before they are rounded.
        final = dtype if weight.dtype == torch.float16 else weight.dtype
        in_place = whole or final == dtype
        new_weight = torch.empty_like if len(rows.ids) else torch.zeros_like
        scratch_shape = (plan.slice_width, weight.shape[1])
        return cls(
            rows.hidden.new_zeros(rows.hidden.shape, dtype=dtype) if needs.hidden else None,
            new_weight(weight, dtype=dtype if in_place else final) if needs.weight else None,
            weight.new_zeros(len(weight), dtype=dtype) if needs.bias else None,
            None if in_place or not needs.weight else weight.new_empty(scratch_shape, dtype=dtype),
            final,
        )

    def rows(self, c: slice, live: Tensor | None = None) -> Tensor | None:
        if self.dhidden is None or live is None:
            return None if self.dhidden is None else self.dhidden[c]
        return self.dhidden.new_empty((len(live), self.dhidden.shape[1]))

    def store_rows(self, c: slice, live: Tensor | None, dhidden: Tensor | None) -> None:
        if self.dhidden is not None and live is not None:
            self.dhidden[c].index_copy_(0, live, dhidden)

    def slice(self, v: slice) -> tuple[Tensor | None, Tensor | None]:
        dweight = self.dweight[v] if self.dweight is not None else None
        if self.scratch is not None:
            dweight = self.scratch[: v.stop - v.start]
        return dweight, None if self.dbias is None else self.dbias[v]

    def store(self, v: slice) -> None:
        if self.scratch is not None:
            self.dweight[v] = self.scratch[: v.stop - v.start]

    def result(self) -> Grads:
        dweight = None if self.dweight is None else self.dweight.to(self.dtype)
        return Grads(self.dhidden, dweight, self.dbias)


def add_tile(
    impl: ModuleType,
    grads: Grads,
    dz: Tensor,  # (n, Vs) gradient of the raw logits
    v: slice,
    weight: Tensor,  # (Vs, H)
    hidden: Tensor,  # (n, H)
    targets: Targets,
    accumulate: bool,
) -> None:
    """Add what a tile gives to hidden, weight and bias.

    `accumulate` False overwrites the slice of dweight instead of adding to it.
    """
    if grads.hidden is not None:
        matmul(grads.hidden, dz, weight, accumulate=v.start > 0)
    if grads.weight is not None:
        matmul(grads.weight, dz.t(), hidden, accumulate)
    if grads.bias is not None:
        grads.bias.add_(dz.sum(0, dtype=grads.bias.dtype))
    if targets.coef is not None:
        add_targets(impl, grads, v, hidden, targets)


def add_exps(
    impl: ModuleType,
    grads: Grads,
    exps: Tensor,  # (n, Vs) bf16: 0 at the targets
    scale: Tensor,  # (n,) fp32: times it, an entry is a gradient of the raw logits
    v: slice,
    hidden: Tensor,  # (n, H)
    scaled_hidden: Tensor,  # (n, H) bf16: scale * hidden
    targets: Targets,
    accumulate: bool,
) -> None:
    """Add what a slice of exponentials gives to weight and bias, like `add_tile`."""
    if grads.weight is not None:
        matmul(grads.weight, exps.t(), scaled_hidden, accumulate)
    if grads.bias is not None:
        # In two 16-bit parts: there is no product with `hidden` to average their rounding.
        high = scale.to(exps.dtype)
        parts = torch.stack([high, (scale - high).to(exps.dtype)], 1)
        sums = scale.new_empty((exps.shape[1], 2))
        matmul(sums, exps.t(), parts)
        grads.bias.add_(sums.sum(1))
    add_targets(impl, grads, v, hidden, targets)


def add_targets(impl: ModuleType, grads: Grads, v: slice, hidden: Tensor, targets: Targets) -> None:
    """Add the target entries that lie in a slice of the vocabulary to weight and bias."""
    where = (targets.sorted_ids, targets.order, targets.coef)
    if grads.weight is not None:
        impl.scatter_rows(grads.weight, *where, hidden, v.start)
    if grads.bias is not None:
        ones = torch.ones_like(targets.coef)[:, None]
        impl.scatter_rows(grads.bias[:, None], *where, ones, v.start)


def matmul(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, in out's dtype also where the operands have 16 bits."""
    mixed = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **mixed)
    else:
        torch.mm(a, b, out=out, **mixed)
