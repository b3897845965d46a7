"""Rows and head, which every op that scores rows takes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastgrpo import checks
from fastgrpo.backend import Kernels
from fastgrpo.dispatch import choice
from fastgrpo.head import sparse, support
from fastgrpo.head.plan import Plan
from fastgrpo.packing import Index
from fastgrpo_kernels import Head, Rows

Result = TypeVar("Result")


class Operands(NamedTuple):
    """Rows and head: the first parameters of every op that scores rows."""

    hidden: Tensor  # (N, H), or (N, H + K) with lora
    weight: Tensor  # (V, H)
    token_ids: Tensor  # (N,), or (N, K) of several ids
    mask: Tensor  # (N,) bool
    bias: Tensor | None  # (V,)
    lora: Tensor | None  # (V, K): the columns of the weight beyond H
    temperature: Tensor | None  # (N,) or (), None = 1
    support_ids: Tensor | None  # (M,): the kept ids of all rows, as `Support.ids`
    support_cu: Tensor | None  # (N + 1,)
    logit_scale: float
    softcap: float
    workspace_mb: float | None
    backend: str

    def run(self, work: Callable[[Plan], Result], rows: Rows, sparse: bool) -> Result:
        """Return `work` of a plan for these rows, with the best kernels that can be launched."""

        def planned(kernels: Kernels) -> Result:
            return work(Plan.of(self.hidden, self.weight, self.workspace_mb, kernels))

        mode = "sparse" if sparse else "dense" if self.support_cu is None else "support"
        return choice.run(planned, self.backend, self.hidden, (rows, self.head()), mode)

    def head(self) -> Head:
        bias = None if self.bias is None else self.bias.contiguous()
        return Head(self.weight, bias, self.logit_scale, self.softcap, self.lora)

    def rows(self, where: Index, ids_name: str = "token_ids") -> Rows:
        """Select rows and check their values (token ids, temperatures)."""
        # The kernels need adjacent ids; the index may be a slice, which keeps the strides.
        ids = self.token_ids[where].contiguous()
        checks.token_ids(ids_name, ids, len(self.weight))
        inverse = None
        if self.temperature is not None:
            per_row = self.temperature.expand(len(self.mask))
            checks.positive_temperature(per_row[where])
            dtype = torch.promote_types(self.hidden.dtype, torch.float32)
            inverse = per_row[where].to(dtype).reciprocal()
        return Rows(self.hidden[where], ids, inverse)

    def kept(self, where: Index, values: Tensor | None = None) -> support.Kept | None:
        """Return the kept ids of the selected rows, None without a support."""
        if self.support_cu is None:
            return None
        return support.Kept(self.support_ids, self.support_cu, values)[where]

    def kept_of(self, rows: Rows, where: Index, ids_name: str = "token_ids") -> support.Kept | None:
        """Return the kept ids of rows selected before, and check their values."""
        kept = self.kept(where)
        if kept is not None and checks.looks_at_values(kept.ids):
            checks.kept_ids(kept.ids, len(self.weight))
            inside, row = kept.cu.diff() == 0, kept.row()
            inside[row[kept.ids == rows.ids[row]]] = True
            checks.within_support(ids_name, rows.ids, inside)
        return kept

    def words(self, sparsity: float, draw_seed: Tensor, where: Index) -> sparse.Words:
        """Return the random words that decide which entries of the selected rows are kept."""
        return sparse.Words.of(sparsity, draw_seed, len(self.mask), len(self.weight))[where]

    def trained(self) -> Tensor:
        """Return what a gradient with respect to the weight belongs to."""
        return getattr(self, name_of_trained(self.lora))

    def dtypes(self) -> tuple[torch.dtype | None, ...]:
        """Return the dtypes of hidden, of the weight that gradients are of, and of bias."""
        tensors = (self.hidden, self.trained(), self.bias)
        return tuple(None if x is None else x.dtype for x in tensors)


def name_of_trained(lora: Tensor | None) -> str:
    """Return the name of the tensor that a gradient with respect to the weight belongs to."""
    return "weight" if lora is None else "lora"
