"""The arguments of launchers: the head, rows, a tile of logits, scores, upstream gradients.

A kernel itself takes only tensors and numbers. `logit_arguments`, `dot_arguments` and
`Tile.arguments` return the keyword arguments of kernels, so that the names are written once.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

PerRow = TypeVar("PerRow", bound=tuple)


def take(rows: PerRow, index: slice | Tensor) -> PerRow:
    """Return some rows of a tuple of per-row tensors, each (n, ...) or None."""
    return type(rows)(*(None if x is None else x[index] for x in rows))


class Head(NamedTuple):
    """The lm_head: z = softcap(logit_scale * (h @ weight.T + bias)) / temperature.

    With `lora`, K more columns of the weight, hidden states are (n, H + K): their last K columns
    multiply these. Then a gradient with respect to the weight is one with respect to `lora` alone,
    and every logit is made in a tile: no kernel that keeps logits in registers reads `lora`.
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float = 0.0  # 0 = off
    lora: Tensor | None = None  # (V, K)

    @property
    def trained(self) -> Tensor:
        """What a gradient with respect to the weight has the shape of: (V, H) or (V, K)."""
        return self.weight if self.lora is None else self.lora

    @property
    def trained_columns(self) -> slice:
        """The columns of hidden states that multiply `trained`."""
        return slice(0 if self.lora is None else self.weight.shape[1], None)

    def weight_rows(self, ids: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Return whole rows of the weight, (n, H) or (n, H + K)."""
        weight = self.weight[ids].to(dtype)
        return weight if self.lora is None else torch.cat([weight, self.lora[ids].to(dtype)], -1)


class Rows(NamedTuple):
    """The positions to score."""

    hidden: Tensor  # (n, H)
    ids: Tensor  # (n,) int64
    inv_temperature: Tensor | None = None  # (n,), None = 1

    __getitem__ = take  # type: ignore[assignment]

    def slope(self, head: Head) -> float | Tensor:
        """Return dz/dz0 of the rows' logits without a softcap: () or (n,)."""
        if self.inv_temperature is None:
            return head.logit_scale
        return self.inv_temperature * head.logit_scale


class Logps(NamedTuple):
    """The scores of rows, in nats."""

    logps: Tensor  # (n,)
    lse: Tensor  # (n,)
    entropy: Tensor | None = None  # (n,)

    __getitem__ = take  # type: ignore[assignment]

    @classmethod
    def empty(cls, rows: Rows, dtype: torch.dtype, with_entropy: bool) -> Logps:
        """Return uninitialised scores of some rows."""
        wanted = (True, True, with_entropy)
        return cls(*(rows.ids.new_empty(len(rows.ids), dtype=dtype) if w else None for w in wanted))

    @classmethod
    def cat(cls, parts: list[Logps]) -> Logps:
        """Return the scores of several chunks of rows as those of one."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*parts, strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


class EntryList(NamedTuple):
    """Some entries of each row, row after row."""

    row: Tensor  # (E,) int64, ascending
    ids: Tensor  # (E,) int64 columns in [0, V)
    is_target: Tensor  # (E,) bool
    z: Tensor  # (E,) fp32; on the torch backend also fp64


class Upstream(NamedTuple):
    """Gradients of the loss with respect to the scores of each row."""

    dlogps: Tensor  # (n,)
    dentropy: Tensor | None = None  # (n,)

    __getitem__ = take  # type: ignore[assignment]

    def alive(self) -> Tensor:
        """Return which rows have a gradient, (n,) bool."""
        alive = self.dlogps != 0
        return alive if self.dentropy is None else alive | (self.dentropy != 0)

    def live(self) -> Tensor:
        """Return the indices of the rows with a gradient. The host waits for their number."""
        return self.alive().nonzero()[:, 0]


class RowState(NamedTuple):
    """Running softmax statistics of each row (n,) over the slices of the vocabulary seen so far.

    Start with max -inf, sum 0, dot 0. Then lse = max + log(sum), logp = (target - max) - log(sum),
    entropy = log(sum) - dot / sum.
    """

    max: Tensor  # of z
    sum: Tensor  # of exp(z - max)
    dot: Tensor  # of exp(z - max) * (z - max); only kept where entropy is asked for
    target: Tensor  # z at the row's id; not written before the slice with that id

    __getitem__ = take  # type: ignore[assignment]

    @classmethod
    def start(cls, rows: Rows, dtype: torch.dtype) -> RowState:
        """Return the state before any logits. The target of an id outside [0, V) stays NaN."""
        values = (-torch.inf, 0.0, 0.0, torch.nan)
        return cls(*(torch.full_like(rows.ids, value, dtype=dtype) for value in values))

    def finish(self, with_entropy: bool) -> Logps:
        """Return the scores, once all slices of the vocabulary have been merged."""
        log_sum = self.sum.log()
        # (target - max) first: exact where the target is the maximum, and logp never exceeds 0.
        logps = (self.target - self.max) - log_sum
        entropy = log_sum - self.dot / self.sum if with_entropy else None
        return Logps(logps, self.max + log_sum, entropy)


class Tile(NamedTuple):
    """Raw logits z0 = h W^T of some rows and a slice of the vocabulary, made by a GEMM."""

    z: Tensor  # (n, Vs) fp32; on the torch backend also fp64, with any strides
    columns: slice  # of the vocabulary
    bias: Tensor | None  # (Vs,)
    rows: Rows
    head: Head

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the kernels that read a tile."""
        return dict(
            z_ptr=self.z,
            ids_ptr=self.rows.ids,
            bias_ptr=self.bias,
            inv_temperature_ptr=self.rows.inv_temperature,
            Vs=self.z.shape[1],
            stride_z=self.z.stride(0),
            vocab_start=self.columns.start,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap,
            SOFTCAP=self.head.softcap != 0.0,
        )


class Draw(NamedTuple):
    """Which entries v of a row are kept: those with exp(z_v - anchor) > u_v.

    u = (column_words xor row_words) / 2^23, exactly uniform. The target's entry is not drawn.
    """

    anchor: Tensor  # (n,) nats; where it is NaN, no entry of the row is drawn
    column_words: Tensor  # (V,) int32, 23 random bits
    row_words: Tensor  # (n,) int32, 23 random bits

    def __getitem__(self, index: slice | Tensor) -> Draw:  # type: ignore[override]
        return Draw(self.anchor[index], self.column_words, self.row_words[index])


def logit_arguments(rows: Rows, head: Head) -> dict[str, Any]:
    """Return the keyword arguments of the kernels that compute all logits of some rows."""
    shape = dict(ids_ptr=rows.ids, N=len(rows.ids), V=len(head.weight))
    return dot_arguments(rows, head) | shape


def dot_arguments(rows: Rows, head: Head) -> dict[str, Any]:
    """Return the keyword arguments of the kernels that compute any logits from hidden states."""
    return dict(
        hidden_ptr=rows.hidden,
        weight_ptr=head.weight,
        bias_ptr=head.bias,
        inv_temperature_ptr=rows.inv_temperature,
        H=rows.hidden.shape[1],
        stride_hidden=rows.hidden.stride(0),
        stride_weight=head.weight.stride(0),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        SOFTCAP=head.softcap != 0.0,
    )


def adjacent_columns(rows: Rows, head: Head) -> tuple[Rows, Head]:
    """Return the operands with adjacent columns, copied where necessary."""
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (rows.hidden, head.weight))
    return rows._replace(hidden=hidden), head._replace(weight=weight)
