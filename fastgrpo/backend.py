"""The interface of a backend: the Triton kernels, or their torch twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fastgrpo_kernels import (
    Anchored,
    Draw,
    EntryList,
    GroupStats,
    Head,
    Kept,
    Logps,
    Marks,
    Rows,
    RowState,
    Tile,
    TokenObjective,
    Tokens,
    TokenTerms,
    Upstream,
)


class AnchoredForward(Protocol):
    """Scores of rows, and on request their exponentials or the entries that they keep."""

    def __call__(
        self,
        rows: Rows,
        head: Head,
        with_entropy: bool,
        *,
        exps: Tensor | None = None,
        marks: Marks | None = None,
    ) -> Anchored: ...


class Kernels(Protocol):
    """The interface of a backend: the modules `fastgrpo_kernels` and `fastgrpo.torch_kernels`.

    A function that a backend does not have is None there, and the loops do without it.
    """

    def matmul(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None: ...

    # ---- a tile of logits ------------------------------------------------------------------------

    def tile_stats(self, tile: Tile, state: RowState, with_entropy: bool) -> None: ...

    def tile_grad(
        self,
        tile: Tile,
        scored: Logps,
        upstream: Upstream,
        out: Tensor,
        dtarget: Tensor | None,
    ) -> None: ...

    def scatter_rows(
        self,
        acc: Tensor,
        sorted_ids: Tensor,
        order: Tensor,
        coef: Tensor,
        rows: Tensor,
        vocab_start: int,
    ) -> None: ...

    @property
    def tile_softmax(self) -> Callable[[Tile, bool], tuple[Logps, Tensor]] | None:
        """Scores of a tile that holds all logits of its rows.

        These become multiples of their probabilities, whose sums are returned too.
        """
        ...

    # ---- logits that stay in registers -----------------------------------------------------------

    @property
    def linear_logps_fwd(self) -> Callable[[Rows, Head, bool], Logps] | None:
        """Scores of any rows."""
        ...

    def has_anchored(self, rows: Rows, head: Head) -> bool:
        """Whether the next two functions take these operands."""
        ...

    @property
    def anchored_logps_fwd(self) -> AnchoredForward | None: ...

    @property
    def linear_draw_fwd(self) -> Callable[[Rows, Head, bool, Draw, Kept], Logps] | None: ...

    # ---- a few entries of each row ---------------------------------------------------------------

    def tile_draw(self, tile: Tile, draw: Draw, kept: Kept) -> None: ...

    @property
    def tile_draw_sum(self) -> Callable[[Tile, Draw, Kept], Tensor] | None:
        """`tile_draw`, returning the sum of exp(z - anchor) of each row."""
        ...

    def entry_logits(
        self, rows: Rows, head: Head, entries: Tensor, count: Tensor | None, out: Tensor
    ) -> None: ...

    def bag_sum(
        self, out: Tensor, table: Tensor, index: Tensor, coef: Tensor, bounds: Tensor
    ) -> None: ...

    def sum_by_id(
        self, out: Tensor, sorted_ids: Tensor, table: Tensor, index: Tensor, coef: Tensor
    ) -> None: ...

    def entry_dots(
        self, out: Tensor, rows: Tensor, row: Tensor, table: Tensor, index: Tensor
    ) -> None: ...

    def segment_softmax(
        self, entries: EntryList, bounds: Tensor, rows: Rows, head: Head, with_entropy: bool
    ) -> Logps: ...

    def entry_grads(
        self,
        entries: EntryList,
        rows: Rows,
        head: Head,
        scored: Logps,
        upstream: Upstream,
        inclusion: Tensor | None = None,
    ) -> Tensor: ...

    # ---- one number per token, per group ---------------------------------------------------------

    def token_loss(
        self, tokens: Tokens, loss: TokenObjective, separate: bool = False
    ) -> TokenTerms: ...

    def segment_reduce(self, x: Tensor, cu_seqlens: Tensor, op: str) -> Tensor: ...

    def group_stats(
        self,
        rewards: Tensor,
        cu_groups: Tensor,
        weights: Tensor | None = None,
        leave_one_out: bool = False,
    ) -> GroupStats: ...
