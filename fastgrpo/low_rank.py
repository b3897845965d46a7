"""An adapter on the head: weight + B @ A, as further columns of hidden states and the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def with_adapter(
    hidden: Tensor,  # (N, H)
    lora: tuple[Tensor, Tensor] | None,  # A (R, H), B (V, R)
) -> tuple[Tensor, Tensor | None]:
    """Return hidden (N, H + K) and the weight's further columns (V, K); (N, H) and None without.

    hidden @ A.T is summed in fp32. In 16 bits it takes two columns, one for what the first rounds
    away, and so does an fp32 B: K is R, 2R or 3R, and no logit is rounded to 16 bits.
    """
    if lora is None:
        return hidden, None
    a, b = lora
    low, dtype = _LowRank.apply(hidden, a), hidden.dtype
    if low.dtype == dtype:
        return torch.cat([hidden, low], 1), b
    high, rest = _halves(low, dtype)
    if b.dtype == dtype:
        return torch.cat([hidden, high, rest], 1), torch.cat([b, b], 1)
    high_b, rest_b = _halves(b, dtype)
    return torch.cat([hidden, high, rest, high], 1), torch.cat([high_b, high_b, rest_b], 1)


def _halves(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x in a dtype, and in the same dtype what that lost."""
    high = x.to(dtype)
    return high, (x - high.to(x.dtype)).to(dtype)


class _LowRank(torch.autograd.Function):
    """hidden @ A.T (N, R) in fp32; a row without gradient may hold anything, NaN too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, a)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.to(dtype) @ a.to(dtype).t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlow: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore
        hidden, a = ctx.saved_tensors
        dhidden = da = None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dhidden = (dlow @ a.to(dlow.dtype)).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                dead = (dlow == 0).all(1)
                kept = hidden.masked_fill(dead[:, None], 0.0)
                da = (dlow.t() @ kept.to(dlow.dtype)).to(a.dtype)
        return dhidden, da
