"""`linear_logps`: log-probs of given tokens from hidden states, without logits."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgrpo import checks, ops
from fastgrpo.values import one_of

Backend = Literal["auto", "triton", "torch"]


class TokenLogps(NamedTuple):
    """What `linear_logps` returns; ignored rows are 0 in all three."""

    logps: Tensor
    """(...) fp32, nats, differentiable."""
    entropy: Tensor | None
    """(...) fp32, nats; None unless asked for."""
    lse: Tensor
    """(...) fp32, nats, detached: logsumexp of the row's logits."""


def linear_logps(
    hidden: Tensor,  # (..., H): hidden[i] is the state that predicts token_ids[i]
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (...) int64
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (...) per token
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: Literal["none", "detached", "differentiable"] = "none",
    ignore_index: int = -100,
    workspace_mb: float | None = None,
    sparsity: float = 0.0,
    seed: int | None = None,
    old_logps: Tensor | None = None,
    backend: Backend = "auto",
) -> TokenLogps:
    """Return the log-probs of `token_ids` under the head, and if asked the entropy of its rows.

    Equivalent to, with fp32 logits that are never rounded to 16 bits and never held:

        z = (hidden @ weight.T + bias) * logit_scale
        z = softcap * tanh(z / softcap) / temperature
        logps = z.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
        entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)

    Args:
        hidden: (..., H) bf16, fp16, fp32; fp64 on the torch backend.
        weight: (V, H), in hidden's dtype or fp32.
        token_ids: (...) int64 in [0, V), or `ignore_index`: such rows give 0, get no gradient, and
            whatever they hold (NaN too) changes nothing. Out of range: ValueError on a CPU and
            inside `fastgrpo.checked()`, otherwise the row's log-prob is NaN.
        bias: (V,), in hidden's dtype or fp32.
        temperature: a number > 0, or a tensor: (), or (...) of one per token.
        logit_scale: factor on the logits (Cohere; Granite's `logits_scaling` is 1 over it).
        softcap: c in c * tanh(z / c) (Gemma); None for none.
        entropy: "none", "detached", or "differentiable", whose gradient costs nothing more.
        workspace_mb: MiB for the logits tile; default `fastgrpo.default_workspace_mb`.
            Less costs speed, never exactness.
        sparsity, seed, old_logps: reserved for the sparse backward; anything but the defaults
            raises.
        backend: "auto" (Triton kernels on GPUs, else torch), "triton" or "torch".

    Cost, NVH being rows * V * H: 2NVH forward; 6NVH backward on the rows that have a gradient. With
    a frozen head (weight and bias without gradient) 4NVH in all, and no GEMM in the backward.

    Raises:
        ValueError: for any argument of the wrong shape, dtype, device or value. Second derivatives
            raise RuntimeError.
    """
    checks.head(hidden, weight, bias, backend)
    checks.transform(logit_scale, softcap, workspace_mb)
    checks.dense_only(sparsity, seed, old_logps)
    shape = tuple(hidden.shape[:-1])
    checks.tensor("token_ids", token_ids, shape, like=hidden, dtypes=(torch.int64,))
    checks.temperature(temperature, shape, hidden)
    one_of("entropy", entropy, ("none", "detached", "differentiable"))
    one_of("backend", backend, ("auto", "triton", "torch"))

    grad = torch.is_grad_enabled()
    head_needs = weight.requires_grad or (bias is not None and bias.requires_grad)
    ids = token_ids.reshape(-1)
    logps, lse, entropies, _ = ops.linear_logps(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        ids,
        ids != ignore_index,
        bias,
        temperature_tensor(temperature, hidden),
        float(logit_scale),
        float(softcap or 0.0),
        entropy != "none",
        grad and hidden.requires_grad and not head_needs and entropy != "differentiable",
        workspace_mb,
        backend,
    )
    if entropy == "none":
        return TokenLogps(logps.view(shape), None, lse.view(shape))
    if entropy == "detached":
        entropies = entropies.detach()
    return TokenLogps(logps.view(shape), entropies.view(shape), lse.view(shape))


def temperature_tensor(temperature: float | Tensor, like: Tensor) -> Tensor | None:
    """Return a temperature as the ops take it: (N,), (), or None for 1."""
    if isinstance(temperature, Tensor):
        return temperature.detach().reshape(-1) if temperature.dim() else temperature.detach()
    return None if temperature == 1 else scalar(temperature, like)


def scalar(x: float, like: Tensor) -> Tensor:
    """Return a number as a tensor (), in the dtype that results of `like` have."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.full((), x, dtype=dtype, device=like.device)
