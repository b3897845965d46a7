"""Attention of a row of tokens that holds many sequences, some of which share their prefix.

It is registered with transformers under `NAME`. A forward that passes `packing` gets it; every
other forward of the same model, such as sampling, gets transformers' sdpa. Everything comes as an
argument, so that gradient checkpointing finds it again in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_or_packing"  # transformers asks of a name with "sdpa" that the model supports sdpa
HALF = (torch.float16, torch.bfloat16)


class UnsupportedAttentionError(ValueError):
    """Attention that `Packing` has no exact form of."""


class Prefix(NamedTuple):
    """A prefix of `length` tokens, then suffixes that see it and themselves; all causal."""

    length: int
    suffixes: tuple[int, ...] = ()


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

    def spans(self) -> Iterator[tuple[slice, slice]]:
        """Yield each run of queries with the prefix that it sees besides itself."""
        start = 0
        for length, suffixes in self.prefixes:
            prefix = slice(start, start + length)
            yield prefix, slice(start, start)
            start += length
            for suffix in suffixes:
                if suffix:
                    yield slice(start, start + suffix), prefix
                start += suffix

    @cached_property
    def varlen(self) -> Varlen:
        """The bounds, made once for all layers."""
        spans = list(self.spans())
        queries = torch.tensor([own.stop - own.start for own, _ in spans])
        seen = queries + torch.tensor([prefix.stop - prefix.start for _, prefix in spans])
        keys = None
        if any(prefix.suffixes for prefix in self.prefixes):
            runs = [torch.arange(r.start, r.stop) for own, prefix in spans for r in (prefix, own)]
            keys = torch.cat(runs).to(self.device)
        bounds = (
            torch.nn.functional.pad(n.cumsum(0), (1, 0)).to(self.device, torch.int32)
            for n in (queries, seen)
        )
        return Varlen(keys, *bounds, int(queries.max()), int(seen.max()))


def attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, L, D)
    key: Tensor,  # (1, key heads, L, D)
    value: Tensor,  # (1, key heads, L, D)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention (1, L, heads, D) of a packed row, or transformers' without `packing`.

    A list `windows` among the others is told the sliding window of each layer that asks. Raises
    UnsupportedAttentionError for what changes attention beyond a causal mask with a window.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            scaling=scaling, sliding_window=sliding_window, **others,
        )  # fmt: skip
    _refuse(module, others)
    if (windows := others.get("windows")) is not None:
        windows.append(sliding_window)
    if query.is_cuda and query.dtype in HALF:
        return _varlen(query, key, value, scaling, sliding_window, packing.varlen)[None], None
    parts = [
        _span(query, key, value, scaling, sliding_window, own, prefix)
        for own, prefix in packing.spans()
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _refuse(module: nn.Module, others: dict[str, Any]) -> None:
    unsupported = [
        name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None
    ]
    causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        unsupported.append("is_causal=False")
    if others.get("dropout"):
        unsupported.append("dropout")
    if unsupported:
        raise UnsupportedAttentionError(
            f"attention: expected a causal mask with a window alone, got {', '.join(unsupported)}"
        )


def _span(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    own: slice,
    prefix: slice,
) -> Tensor:
    """Return what a run of queries (1, heads, T, D) sees of its prefix and of itself."""
    tokens, before = own.stop - own.start, prefix.stop - prefix.start
    key, value = (
        torch.cat((x[:, :, prefix], x[:, :, own]), dim=2) if before else x[:, :, own]
        for x in (key, value)
    )
    plain = window is None or before + tokens <= window
    mask = None
    if not plain or (before and tokens > 1):
        mask = torch.ones(tokens, before + tokens, dtype=torch.bool, device=query.device)
        mask = mask.tril(before)
        if not plain:
            mask = mask.triu(before + 1 - window)
    return scaled_dot_product_attention(
        query[:, :, own],
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and not before and tokens > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    bounds: Varlen,
) -> Tensor:
    """Return the attention (L, heads, D) by a kernel that takes bounds: flash-attn's or torch's.

    Queries are aligned with the last keys of their sequence in both.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if bounds.keys is not None:
        key, value = key[bounds.keys], value[bounds.keys]
    left = -1 if window is None else window - 1
    ranges = (bounds.cu_queries, bounds.cu_keys, bounds.max_queries, bounds.max_keys)
    if find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            query, key, value, *ranges, softmax_scale=scaling, causal=True, window_size=(left, 0)
        )
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return varlen_attn(query, key, value, *ranges, scale=scaling, window_size=(left, 0))
