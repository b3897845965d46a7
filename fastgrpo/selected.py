"""`selected_logps`: log-probs of several given ids per token, without logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import autocast, checks, ops
from fastgrpo.logps import Backend, temperature_tensor


class SelectedLogps(NamedTuple):
    """What `selected_logps` returns; an ignored token is 0 in all four."""

    logps: Tensor
    """(..., K) fp32, nats, differentiable; 0 at ignored ids."""
    lse: Tensor
    """(...) fp32, nats, differentiable: logsumexp of the token's logits."""
    entropy: Tensor
    """(...) fp32, nats, differentiable: of the softmax over the whole vocabulary."""
    sum_squares: Tensor
    """(...) fp32, detached: the sum of the squared probabilities, in [1 / V, 1]."""


def selected_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    selected_ids: Tensor,  # (..., K) int64
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (...) per token
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_mb: float | None = None,
    backend: Backend = "auto",
) -> SelectedLogps:
    """Return the log-probs of K ids per token under the softmax over the whole vocabulary.

    Equivalent to, with fp32 logits that are never rounded to 16 bits and never held:

        z = (hidden @ weight.T + bias) * logit_scale
        z = softcap * tanh(z / softcap) / temperature
        logps = z.log_softmax(-1).gather(-1, selected_ids)
        lse = z.logsumexp(-1)
        p = z.softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        sum_squares = p.square().sum(-1).detach()

    For distillation from a teacher's K likeliest tokens, and for what weighs tokens by their whole
    distribution: the expected squared norm of the score with respect to the logits is
    1 - sum_squares, that of a sampled token y is 1 - 2 p_y + sum_squares
    (docs/losses.md#log-probs-of-several-ids).

    Args:
        hidden: (..., H) bf16, fp16, fp32; fp64 on the torch backend. Padded (B, T, H), packed
            (N, H), or any other layout.
        weight: (V, H), in hidden's dtype or fp32.
        selected_ids: (..., K) int64, K >= 1, each in [0, V) or `ignore_index`. An id may come
            several times; each is a result of its own. An ignored id gives 0 and gets no gradient.
            A token all of whose ids are ignored gives 0 everywhere, and whatever it holds (NaN too)
            changes nothing. Out of range: ValueError on a CPU and inside `fastgrpo.checked()`,
            otherwise the id's log-prob and its gradient are NaN.
        bias: (V,), in hidden's dtype or fp32.
        temperature: a number > 0, or a tensor: (), or (...) of one per token.
        logit_scale: factor on the logits.
        softcap: c in c * tanh(z / c); None for none.
        workspace_mb: MiB for the logits tile; default `fastgrpo.default_workspace_mb`.
            Less costs speed, never exactness.
        backend: as in `linear_logps`. "triton" takes its portable kernels.

    Gradients reach hidden, weight and bias from logps, lse and entropy, and have the dtypes of
    these. Autocast on CUDA is as in `linear_logps`.

    Cost, NVH being rows * V * H: 2NVH forward, 6NVH backward on the rows that have a gradient (4NVH
    with a frozen head), and a row of the weight for each id in either. No tensor of rows x
    vocabulary is made. A 16-bit weight's gradient is summed in fp32, 4VH bytes.

    Raises:
        ValueError: for any argument of the wrong shape, dtype, device or value. Second derivatives
            raise RuntimeError, forward-mode derivatives NotImplementedError.
    """
    hidden, weight = autocast.operand(hidden), autocast.operand(weight)
    checks.head(hidden, weight, bias, backend)
    checks.no_forward_mode(hidden, weight, bias)
    checks.transform(logit_scale, softcap, workspace_mb)
    shape = tuple(hidden.shape[:-1])
    checks.tensor("selected_ids", selected_ids, like=hidden, dtypes=(torch.int64,))
    if tuple(selected_ids.shape[:-1]) != shape or not selected_ids.shape[-1]:
        expected = f"({', '.join(map(str, (*shape, 'K')))})"
        raise ValueError(
            f"selected_ids: expected shape {expected}, K >= 1, got {tuple(selected_ids.shape)}"
        )
    checks.ignore_index(ignore_index)
    checks.temperature(temperature, shape, hidden)
    checks.one_of("backend", backend, ("auto", "triton", "torch"))
    ids = selected_ids.reshape(-1, selected_ids.shape[-1])
    chosen = ids != ignore_index
    logps, *scores = ops.selected_logps(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        ids.masked_fill(~chosen, 0),
        chosen,
        bias,
        temperature_tensor(temperature, hidden),
        float(logit_scale),
        float(softcap or 0.0),
        workspace_mb,
        backend,
    )
    return SelectedLogps(logps.view(selected_ids.shape), *(x.view(shape) for x in scores))
