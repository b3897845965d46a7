"""Attention of a row of tokens that holds many sequences, some of which share their prefix.

It is registered with transformers under `NAME`. A forward that passes `packing` gets it; every
other forward of the same model, such as sampling, gets transformers' sdpa. Everything comes as an
argument, so that gradient checkpointing finds it again in the backward.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .packed_row import Packing, Varlen, length

NAME = "sdpa_or_packing"  # transformers asks of a name with "sdpa" that the model supports sdpa
HALF = (torch.float16, torch.bfloat16)


class UnsupportedAttentionError(ValueError):
    """Attention that `Packing` has no exact form of."""


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
    given = (query, key, value, scaling, sliding_window, packing)
    if torch.is_grad_enabled() and any(length(call.prefix) for call in packing.calls):
        # Otherwise the backward would keep a copy of the prefix's keys and values for each call.
        return checkpoint(_calls, *given, use_reentrant=False, preserve_rng_state=False), None
    return _calls(*given), None


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


def _calls(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    packing: Packing,
) -> Tensor:
    """Return the attention (1, L, heads, D), call by call."""
    sizes = [length(call.own) for call in packing.calls]
    split = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    masks = packing.masks(window, query.dtype)
    parts = []
    for call, mask, (own_query, own_key, own_value) in zip(
        packing.calls, masks, split, strict=True
    ):
        if length(call.prefix):
            own_key = torch.cat((key[:, :, call.prefix], own_key), dim=2)
            own_value = torch.cat((value[:, :, call.prefix], own_value), dim=2)
        part = scaled_dot_product_attention(
            own_query,
            own_key,
            own_value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


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
