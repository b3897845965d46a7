"""`Support`: the token ids that a sampler could have drawn, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgrpo import checks
from fastgrpo.packing import entries_of, rows_of_entries

INTEGERS = (torch.int64, torch.int32)
BLOCK = 2**22  # logits that are sorted at once


@dataclass(frozen=True, eq=False)
class Support:
    """What a sampler with top-k, top-p or min-p could have drawn: a few ids for each token.

    The kept ids of token i are ids[cu[i] : cu[i + 1]], in any order. Tokens are counted row by row
    in their layout. A token without ids has the whole vocabulary. `of_lists`, `of_mask` and
    `of_logits` make one.

    Args:
        ids: (M,) int64 or int32, at least 0, distinct within a token; kept as int64. That they are
            below V is checked where the weight is known.
        cu: (N + 1,) int64 or int32 bounds, from 0 to M; kept as int64.
        shape: of the layout of the N tokens, such as (B, T); (): (N,).

    Raises:
        ValueError: for a wrong shape, dtype or device. For wrong values on a CPU, and on a GPU
            inside `fastgrpo.checked()`.
    """

    ids: Tensor
    cu: Tensor
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks.tensor("ids", self.ids, dtypes=INTEGERS)
        checks.tensor("cu", self.cu, like=self.ids, dtypes=INTEGERS)
        if self.ids.dim() != 1:
            raise ValueError(f"ids: expected shape (M,), got {tuple(self.ids.shape)}")
        if self.cu.dim() != 1 or not len(self.cu):
            raise ValueError(f"cu: expected shape (N + 1,), got {tuple(self.cu.shape)}")
        ints = int | torch.SymInt
        if not isinstance(self.shape, Sequence) or not all(isinstance(x, ints) for x in self.shape):
            raise ValueError(f"shape: expected a tuple of ints, got {self.shape!r}")
        tokens = len(self.cu) - 1
        shape = tuple(self.shape) or (tokens,)
        if math.prod(shape) != tokens or min(shape) < 0:
            raise ValueError(f"shape: expected one of {tokens} tokens as cu has, got {shape}")
        object.__setattr__(self, "ids", self.ids.long())
        object.__setattr__(self, "cu", self.cu.long())
        object.__setattr__(self, "shape", shape)
        if checks.looks_at_values(self.ids):
            self._check_values()

    @classmethod
    def of_lists(
        cls, lists: Sequence[Sequence[int] | Tensor], mask: Tensor | None = None
    ) -> Support:
        """Return the support of tokens whose kept ids are listed, on the CPU or mask's device.

        Args:
            lists: the kept ids of each token; an empty list stands for the whole vocabulary.
            mask: bool (...), such as a completion mask (B, T): the lists belong to its True tokens,
                row by row, and the others have the whole vocabulary. None: the layout is (N,).

        Raises:
            ValueError: for a number of lists that is not that of the tokens, and as `Support` does.
        """
        if mask is not None:
            checks.tensor("mask", mask, dtypes=(torch.bool,))
        device = None if mask is None else mask.device
        try:
            ids = [torch.as_tensor(some) for some in lists]
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"lists: expected a list of ints for each token: {error}") from error
        counts = torch.tensor([some.numel() for some in ids], dtype=torch.int64)
        for some in ids:
            if some.numel() and (some.dim() != 1 or some.dtype not in INTEGERS):
                raise ValueError(f"lists: expected a list of ints for each token, got {some}")
        joined = torch.cat([some.flatten().long() for some in ids]) if ids else counts
        if mask is not None:
            if int(mask.sum()) != len(counts):
                raise ValueError(
                    f"lists: expected one for each of the {int(mask.sum())} True tokens of mask,"
                    f" got {len(counts)}"
                )
            given, counts = counts, torch.zeros(mask.numel(), dtype=torch.int64)
            counts[mask.flatten().cpu()] = given
        shape = () if mask is None else tuple(mask.shape)
        return cls(joined.to(device), _bounds(counts).to(device), shape)

    @classmethod
    def of_mask(cls, mask: Tensor) -> Support:
        """Return the support of tokens that keep what is True in mask (..., V) bool.

        A token that keeps nothing or everything has the whole vocabulary, and is stored without
        ids. Raises ValueError for another dtype or a mask without columns.
        """
        checks.tensor("mask", mask, dtypes=(torch.bool,))
        if mask.dim() < 2 or not mask.shape[-1]:
            raise ValueError(f"mask: expected shape (..., V), V >= 1, got {tuple(mask.shape)}")
        kept = mask.reshape(-1, mask.shape[-1])
        row, ids = (kept & ~kept.all(-1, keepdim=True)).nonzero().unbind(1)
        return cls(ids, _bounds(torch.bincount(row, minlength=len(kept))), tuple(mask.shape[:-1]))

    @classmethod
    @torch.no_grad()
    def of_logits(
        cls,
        logits: Tensor,
        temperature: float | Tensor = 1.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> Support:
        """Return what sampling from logits keeps: temperature, then top-k, top-p, min-p.

        This is the order, and the arithmetic, of transformers' `generate`. Engines that filter in
        another order keep other ids: take those that they report.

        Args:
            logits: (..., V) floating point, computed on in fp32 at least, a few rows at once.
            temperature: a number > 0, or (...) of one per token.
            top_k: keep the k largest, and what equals the k-th.
            top_p: keep the likeliest until their mass is top_p, in (0, 1].
            min_p: keep what has at least min_p times the largest probability, in [0, 1].

        Raises:
            ValueError: for any argument of the wrong shape, dtype or value, and where none of
                top_k, top_p and min_p is given.
        """
        checks.tensor("logits", logits, dtypes=checks.FLOATS)
        if logits.dim() < 2 or not logits.shape[-1]:
            raise ValueError(f"logits: expected shape (..., V), got {tuple(logits.shape)}")
        shape, vocab = tuple(logits.shape[:-1]), logits.shape[-1]
        checks.temperature(temperature, shape, logits)
        if top_k is None and top_p is None and min_p is None:
            raise ValueError("top_k: expected one of top_k, top_p and min_p, got none of them")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k: expected an int >= 1, got {top_k!r}")
        if top_p is not None:
            checks.share("top_p", top_p)
        if min_p is not None:
            checks.finite("min_p", min_p, 0.0, 1.0)
        divisor = torch.as_tensor(temperature, device=logits.device)
        checks.positive_temperature(divisor)
        divisor = divisor.expand(shape).reshape(-1, 1)
        rows, parts = logits.reshape(-1, vocab), []
        step = max(1, BLOCK // vocab)
        for start in range(0, len(rows), step):
            c = slice(start, start + step)
            z = rows[c].to(torch.promote_types(rows.dtype, torch.float32)) / divisor[c]
            kept = _kept(z, top_k, top_p, min_p)
            if checks.looks_at_values(z):
                _check_kept(z, kept)
            parts.append(cls.of_mask(kept))
        whole = cls.cat(parts) if parts else cls.of_mask(rows.bool())
        return cls._of(whole.ids, whole.cu, shape)

    @property
    def counts(self) -> Tensor:
        """How many ids each token keeps, int64 of the layout's shape; 0: the whole vocabulary."""
        return self.cu.diff().view(self.shape)

    def select(self, rows: slice | Tensor, columns: slice = slice(None)) -> Support:
        """Return the support of some rows of the layout and, where it has them, of some columns.

        Args:
            rows: a slice, or (n,) int64 indices or a bool mask, as they index a tensor.
            columns: of a layout with two dimensions or more.
        """
        places = torch.arange(len(self.cu) - 1, device=self.cu.device).view(self.shape)[rows]
        places = places if columns == slice(None) else places[:, columns]
        entries, cu = entries_of(self.cu, places.reshape(-1))
        return self._of(self.ids[entries], cu, tuple(places.shape))

    def view(self, *shape: int) -> Support:
        """Return the support of the same tokens, row by row, in a layout of another shape.

        Raises ValueError for a shape of another number of tokens.
        """
        if math.prod(shape) != len(self.cu) - 1 or min(shape, default=0) < 0:
            raise ValueError(f"shape: expected one of {len(self.cu) - 1} tokens, got {shape}")
        return self._of(self.ids, self.cu, shape)

    @classmethod
    def cat(cls, supports: Sequence[Support]) -> Support:
        """Return the support of several layouts one below the other, as `torch.cat` of dim 0 does.

        Raises ValueError for no layout, and for shapes that differ beyond the first dimension.
        """
        shapes = [support.shape for support in supports]
        if not shapes or any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise ValueError(f"supports: expected shapes that differ in dim 0 alone, got {shapes}")
        counts = torch.cat([support.cu.diff() for support in supports])
        ids = torch.cat([support.ids for support in supports])
        rows = sum(shape[0] for shape in shapes)
        return cls._of(ids, _bounds(counts), (rows, *shapes[0][1:]))

    def to(self, device: torch.device | str) -> Support:
        """Return the support on another device, or itself."""
        moved = self.ids.to(device), self.cu.to(device)
        return self if moved[0] is self.ids else self._of(*moved, self.shape)

    @classmethod
    def _of(cls, ids: object, cu: object, shape: tuple[int, ...]) -> Support:
        """Return a support of what has been checked, or of what stands for its tensors."""
        made = object.__new__(cls)
        for name, value in (("ids", ids), ("cu", cu), ("shape", shape)):
            object.__setattr__(made, name, value)
        return made

    def _check_values(self) -> None:
        bounds, ids = self.cu, self.ids
        if bounds[0] != 0 or bounds[-1] != len(ids) or bool((bounds.diff() < 0).any()):
            raise ValueError(
                f"cu: expected a non-decreasing sequence from 0 to M = {len(ids)}, got one from "
                f"{bounds[0].item()} to {bounds[-1].item()}, with a least step of "
                f"{bounds.diff().amin().item() if len(bounds) > 1 else None}"
            )
        if not len(ids):
            return
        if bool((ids < 0).any()):
            raise ValueError(f"ids: expected numbers >= 0, got {ids.amin().item()}")
        row = rows_of_entries(bounds, len(ids))
        same_row = row[1:] == row[:-1]
        if not bool((same_row & (ids[1:] <= ids[:-1])).any()):
            return  # ascending in every token
        order = ids.argsort(stable=True)
        order = order[row[order].argsort(stable=True)]
        again = (same_row & (ids[order][1:] == ids[order][:-1])).nonzero()[:, 0]
        if len(again):
            found = ids[order[again[0]]].item()
            raise ValueError(
                f"ids: expected distinct ids within a token, got {found} twice in token "
                f"{row[again[0]].item()}"
            )


def check_support(support: object, shape: tuple[int, ...], like: Tensor, sparsity: float) -> None:
    """Raise ValueError unless a support belongs to tokens of this shape on the device of `like`."""
    if not isinstance(support, Support):
        raise ValueError(f"support: expected a fastgrpo.Support, got {type(support).__name__}")
    if support.shape != shape:
        raise ValueError(f"support: expected one of tokens {shape}, got {support.shape}")
    checks.tensor("support.ids", support.ids, like=like)
    if sparsity:
        raise ValueError(
            f"sparsity: expected 0 with support, whose gradients are exact; got {sparsity}"
        )


def _check_kept(z: Tensor, kept: Tensor) -> None:
    """Raise ValueError for logits that nothing can be sampled from."""
    if not bool((z < torch.inf).all()) or not bool(kept.any(-1).all()):
        raise ValueError(
            "logits: expected no NaN and no +inf, and a finite one for each token, got others"
        )


def _kept(z: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    """Return which logits (n, V) a sampler keeps, as bool."""
    if top_k is not None:
        least = z.topk(min(top_k, z.shape[1])).values[:, -1:]
        z = z.masked_fill(z < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ascending, order = z.sort()
        beyond = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        beyond[:, -1] = False
        z = z.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    if min_p is not None:
        p = z.softmax(-1)
        z = z.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return z > -torch.inf


def _bounds(counts: Tensor) -> Tensor:
    """Return where each token's ids begin and end, (N + 1,) of counts (N,)."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _flatten(support: Support) -> tuple[list[Tensor], tuple[int, ...]]:
    return [support.ids, support.cu], support.shape


def _unflatten(leaves: Iterable[object], shape: tuple[int, ...]) -> Support:
    ids, cu = leaves
    return Support._of(ids, cu, shape)


# What moves the arguments of a wrapped module finds the tensors.
pytree.register_pytree_node(Support, _flatten, _unflatten, serialized_type_name="fastgrpo.Support")
