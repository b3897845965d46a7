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

    hidden @ A.T is summed in fp32. In 16 bits it takes several columns, each for what those before
    it rounded away, and so does an fp32 B. So no logit is rounded to 16 bits, and K is R, 2R or 3R;
    with an fp32 B beside 16-bit hidden states 3R (fp16) or 6R (bf16).
    """
    if lora is None:
        return hidden, None
    a, b = lora
    low, dtype = _LowRank.apply(hidden, a), hidden.dtype
    if low.dtype == dtype:
        return torch.cat([hidden, low], 1), b
    count = 3 if dtype == torch.bfloat16 else 2
    lows = _parts(low, dtype, count)
    ups = [b] if b.dtype == dtype else _parts(b, dtype, count)
    pairs = [(x, y) for i, x in enumerate(lows) for j, y in enumerate(ups) if i + j < count]
    columns = list(zip(*pairs, strict=True))
    return torch.cat([hidden, *columns[0]], 1), torch.cat(columns[1], 1)


def _parts(x: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Return tensors of a dtype whose sum is x, but for what the last one rounds away."""
    parts = []
    for _ in range(count):
        parts.append(x.to(dtype))
        x = x - parts[-1].to(x.dtype)
    return parts


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
