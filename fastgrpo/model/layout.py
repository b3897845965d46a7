"""From tokens in the layout of input_ids to the rows that predict them, and back."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgrpo import checks
from fastgrpo.support import Support


class Layout(Protocol):
    """Where the trained tokens of a batch are, and the states that predict them.

    "Per token" is what `grpo_loss` takes: (B, L) or packed (N,).
    """

    @property
    def mask(self) -> Tensor:
        """The trained tokens, bool per token."""
        ...

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Where each packed sequence begins (S + 1,); None: a sequence per row."""
        ...

    def states(self, hidden: Tensor) -> Tensor:
        """Return the hidden states that predict the tokens, of (B, L, H)."""
        ...

    def tokens(self, x: Tensor) -> Tensor:
        """Return what belongs to the tokens, of (B, L)."""
        ...

    def kept(self, support: Support) -> Support:
        """Return the support of the tokens, of one of (B, L)."""
        ...

    def spread(self, x: Tensor) -> Tensor:
        """Return (B, L) from what is per token: 0 at the tokens that are not trained on."""
        ...


class Rows(NamedTuple):
    """A sequence in each row; every token is predicted by the state before it.

    Entry t of what is per token belongs to token t + 1, so that no hidden state is copied.
    """

    mask: Tensor  # (B, L)
    cu_seqlens: None = None

    @classmethod
    def of(cls, loss_mask: Tensor) -> Rows:
        return cls(pad(loss_mask[:, 1:], (0, 1)))

    def states(self, hidden: Tensor) -> Tensor:
        return hidden

    def tokens(self, x: Tensor) -> Tensor:
        return pad(x[:, 1:], (0, 1))

    def kept(self, support: Support) -> Support:
        n = self.mask.numel()
        # The last entry of a row is masked, whatever it holds.
        following = torch.arange(1, n + 1, device=self.mask.device).clamp(max=max(0, n - 1))
        return support.view(n).select(following).view(*self.mask.shape)

    def spread(self, x: Tensor) -> Tensor:
        return pad(x[:, :-1], (1, 0))


class Packed(NamedTuple):
    """The trained tokens alone, sequence by sequence.

    Row i belongs to token `token[i]` of the flattened batch (B * L,), and is predicted by the
    hidden state at `state[i]`.
    """

    shape: torch.Size  # (B, L)
    token: Tensor  # (N,) int64
    state: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (S + 1,) int64

    @classmethod
    def of(
        cls,
        loss_mask: Tensor,  # (B, L) bool
        source: Tensor | None,  # (B, L) int64; None: the position before
        sequence_ids: Tensor | None,  # (B, L) int64; None: the row
        sequences: int | None,  # None: as many as there are
    ) -> Packed:
        rows, length = loss_mask.shape
        checks.no_capture(loss_mask.device)
        token = loss_mask.flatten().nonzero()[:, 0]
        row, position = token // length, token % length
        ids = row if sequence_ids is None else sequence_ids.flatten()[token]
        if sequence_ids is not None:
            ids, order = ids.sort(stable=True)
            token, row, position = token[order], row[order], position[order]
        if sequences is None:
            sequences = rows if sequence_ids is None else int(sequence_ids.max()) + 1
        state = position - 1 if source is None else source.flatten()[token]
        cu_seqlens = torch.searchsorted(ids, torch.arange(sequences + 1, device=ids.device))
        return cls(loss_mask.shape, token, row * length + state, cu_seqlens)

    @property
    def mask(self) -> Tensor:
        return torch.ones_like(self.token, dtype=torch.bool)

    def states(self, hidden: Tensor) -> Tensor:
        return hidden.flatten(0, 1)[self.state]

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten()[self.token]

    def kept(self, support: Support) -> Support:
        return support.view(self.shape.numel()).select(self.token)

    def spread(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.shape).view(-1).index_copy(0, self.token, x).view(self.shape)


def check(
    input_ids: Tensor, attention_mask: Tensor | None, loss_mask: Tensor, **integers: Tensor | None
) -> None:
    """Raise ValueError for masks and positions that do not fit the token ids (B, L)."""
    checks.tensor("input_ids", input_ids, dtypes=(torch.int64,))
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected shape (B, L), got {tuple(input_ids.shape)}")
    shape = tuple(input_ids.shape)
    checks.tensor("loss_mask", loss_mask, shape, like=input_ids, dtypes=(torch.bool,))
    if attention_mask is not None:
        kinds = (torch.bool, torch.int64, torch.int32)
        checks.tensor("attention_mask", attention_mask, shape, like=input_ids, dtypes=kinds)
    for name, x in integers.items():
        if x is not None:
            checks.tensor(name, x, shape, like=input_ids, dtypes=(torch.int64,))
    if not _looks_at(input_ids):
        return
    if bool(loss_mask[:, 0].any()) and integers.get("source") is None:
        raise ValueError("loss_mask: expected False at position 0, which no state predicts")
    if attention_mask is not None and bool((loss_mask & (attention_mask == 0)).any()):
        raise ValueError("loss_mask: expected False where attention_mask is 0")
    if attention_mask is not None and integers.get("source") is None:
        before = pad(attention_mask[:, :-1], (1, 0))
        if bool((loss_mask & (before == 0)).any()):
            raise ValueError(
                "loss_mask: expected False at the first token of a row, which padding would predict"
            )
    source = integers.get("source")
    if source is not None and bool((loss_mask & ((source < 0) | (source >= shape[1]))).any()):
        raise ValueError(f"source: expected positions in [0, {shape[1]}) where loss_mask is True")


def check_sequences(sequences: int | None, sequence_ids: Tensor | None, rows: int) -> None:
    """Raise ValueError for advantages (S,) that are not one for each sequence."""
    if sequences is None:
        return
    if sequence_ids is None and sequences != rows:
        raise ValueError(f"advantages: expected shape ({rows},) or (B, L), got ({sequences},)")
    if sequence_ids is not None and _looks_at(sequence_ids):
        last = int(sequence_ids.max())
        if last >= sequences or int(sequence_ids.min()) < 0:
            raise ValueError(f"sequence_ids: expected numbers in [0, {sequences}), got {last}")


def _looks_at(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and checks.looks_at_values(x)


def refuse_unseparated(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    sequence_ids: Tensor | None,
    source: Tensor | None,
) -> None:
    """Raise ValueError for packed rows whose sequences would attend to each other."""
    if sequence_ids is None or source is not None or position_ids is not None:
        return
    several = _looks_at(sequence_ids) and bool((sequence_ids != sequence_ids[:, :1]).any())
    if attention_mask is None and several:
        raise ValueError(
            "position_ids: expected for rows that hold several sequences, beginning at 0 for each:"
            " without them the sequences attend to each other"
        )
