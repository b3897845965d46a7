"""A row of tokens that holds many sequences, some of which share their prefix: who sees whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

FEW = 128  # tokens of a call with several sequences: it also computes what its mask hides


class Prefix(NamedTuple):
    """A prefix of `length` tokens, then suffixes that see it and themselves; all causal."""

    length: int
    suffixes: tuple[int, ...] = ()


class Span(NamedTuple):
    """Queries side by side, and the prefix that they see besides themselves."""

    own: slice
    prefix: slice


class Call(NamedTuple):
    """Spans side by side, which one call of sdpa computes, and the prefix that stands before."""

    spans: list[Span]
    prefix: slice

    @property
    def own(self) -> slice:
        """All queries."""
        return slice(self.spans[0].own.start, self.spans[-1].own.stop)

    def takes(self, span: Span) -> bool:
        """Return whether with one more span the tokens are few, and the prefix is the same."""
        if span.own.stop - self.own.start > FEW:
            return False
        if length(self.prefix):
            return span.prefix == self.prefix
        return span.prefix.start >= self.own.start

    def mask(self, window: int | None) -> Tensor | None:
        """Return which keys of prefix and queries each query sees, (T, K) bool; None: causal."""
        own, before = self.own, length(self.prefix)
        plain = window is None or length(own) <= window
        if len(self.spans) == 1 and not before and plain:
            return None
        bounds = [(q.start, p.start, p.stop) for q, p in self.spans]
        sizes = torch.tensor([length(q) for q, _ in self.spans])
        # Of each query (T, 1): where its sequence begins, and its prefix begins and ends.
        first, start, stop = torch.tensor(bounds).repeat_interleave(sizes, dim=0).split(1, dim=1)
        queries = torch.arange(own.start, own.stop)
        keys = torch.cat((torch.arange(self.prefix.start, self.prefix.stop), queries))
        queries = queries[:, None]
        mask = (start <= keys) & (keys < stop) | (first <= keys) & (keys <= queries)
        if window is not None:
            mask &= queries - keys - torch.where(keys < stop, first - stop, 0) < window
        return mask


class Varlen(NamedTuple):
    """The same as sequences of queries and of keys, for kernels that take bounds."""

    keys: Tensor | None  # (K,) int64: the token of each key; None: each token once
    cu_queries: Tensor  # (M + 1,) int32
    cu_keys: Tensor  # (M + 1,) int32
    max_queries: int
    max_keys: int


@dataclass(frozen=True)
class Packing:
    """What a row (1, L) of tokens consists of, one prefix with its suffixes after the other."""

    prefixes: tuple[Prefix, ...]
    device: torch.device

    def spans(self) -> Iterator[Span]:
        """Yield all tokens, run by run."""
        start = 0
        for prefix_length, suffixes in self.prefixes:
            prefix = slice(start, start + prefix_length)
            yield Span(prefix, slice(start, start))
            start += prefix_length
            for suffix in suffixes:
                if suffix:
                    yield Span(slice(start, start + suffix), prefix)
                start += suffix

    @cached_property
    def calls(self) -> list[Call]:
        """The spans, with as many in a call as make few tokens."""
        calls: list[Call] = []
        for span in self.spans():
            if calls and calls[-1].takes(span):
                calls[-1].spans.append(span)
            else:
                calls.append(Call([span], span.prefix))
        return calls

    def masks(self, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        """Return what is added to the scores of each call, 0 or -inf; None: a causal mask.

        They are made once for all layers with this window.
        """
        if (window, dtype) not in self._masks:
            seen = [call.mask(window) for call in self.calls]
            self._masks[window, dtype] = [
                None
                if mask is None
                else torch.zeros(mask.shape, dtype=dtype)
                .masked_fill(~mask, -torch.inf)
                .to(self.device)
                for mask in seen
            ]
        return self._masks[window, dtype]

    @cached_property
    def _masks(self) -> dict[tuple[int | None, torch.dtype], list[Tensor | None]]:
        return {}

    @cached_property
    def varlen(self) -> Varlen:
        """The bounds, made once for all layers."""
        spans = list(self.spans())
        queries = torch.tensor([length(own) for own, _ in spans])
        seen = queries + torch.tensor([length(prefix) for _, prefix in spans])
        keys = None
        if any(prefix.suffixes for prefix in self.prefixes):
            runs = [torch.arange(r.start, r.stop) for own, prefix in spans for r in (prefix, own)]
            keys = torch.cat(runs).to(self.device)
        bounds = (
            torch.nn.functional.pad(n.cumsum(0), (1, 0)).to(self.device, torch.int32)
            for n in (queries, seen)
        )
        return Varlen(keys, *bounds, int(queries.max()), int(seen.max()))


def length(run: slice) -> int:
    """Return the tokens of a run."""
    return run.stop - run.start
