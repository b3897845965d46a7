"""`linear_logps`: log-probs of given tokens from hidden states, without logits."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgrpo import autocast, checks, ops
from fastgrpo.checks import one_of
from fastgrpo.low_rank import with_adapter
from fastgrpo.support import Support, check_support

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
    lora: tuple[Tensor, Tensor] | None = None,  # (R, H), (V, R)
    temperature: float | Tensor = 1.0,  # or (...) per token
    logit_scale: float = 1.0,
    softcap: float | None = None,
    support: Support | None = None,  # of tokens (...)
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
            inside `fastgrpo.checked()`, otherwise the row's log-prob and its gradient are NaN.
        bias: (V,), in hidden's dtype or fp32.
        lora: (A, B) of an adapter on a frozen weight, which counts as weight + B @ A: A (R, H) with
            its scaling, B (V, R), each in hidden's dtype or fp32. B @ A is never made. Kernels that
            keep logits in registers are not used. Not with `sparsity`. In fp16, hidden @ A.T must
            be below 65,504.
        temperature: a number > 0, or a tensor: (), or (...) of one per token.
        logit_scale: factor on the logits (Cohere; Granite's `logits_scaling` is 1 over it).
        softcap: c in c * tanh(z / c) (Gemma); None for none.
        support: the ids that each token was drawn from, of layout (...): log-probs, lse and entropy
            are those of the softmax over these alone, and so are the gradients (docs/support.md).
            Each z above is -inf at the other ids. Ids in [0, V). A token that is not among its ids
            is a ValueError on a CPU and inside `fastgrpo.checked()`, otherwise its log-prob is NaN.
            Not with `sparsity`.
        entropy: "none", "detached", or "differentiable", whose gradient costs nothing more.
        workspace_mb: MiB for the logits tile; default `fastgrpo.default_workspace_mb`.
            Less costs speed, never exactness.
        sparsity: 0 gives exact gradients. tau in (0, 1) gives unbiased ones, made of about 1/tau
            entries of each row or fewer (docs/sparse-backward.md). Log-probs and entropies stay
            exact. The gradient with respect to the logits has at most tau / (1 - tau) more variance
            than sampling the tokens gives it.
        seed: of the entries that `sparsity` draws: the same seed gives the same bits. Calls and
            ranks that share one share their errors: take one for each. None: PyTorch's generator.
        old_logps: (...), nats, of about the same policy, such as those at sampling time. With them
            entries are drawn in the forward, without them in a second pass of the backward. How far
            off they are changes the number of entries and the variance, not the mean. NaN, where
            there is none, counts as probability 1.
        backend: "auto" takes the Triton kernels on GPUs where they pass a check at their first use,
            and torch elsewhere. "triton" raises instead, "torch" never takes them. The environment
            variable FASTGRPO_BACKEND names what "auto" is.

    Autocast on CUDA casts hidden and weight to its dtype, as it does for a linear layer. Logits
    stay fp32, and gradients have the dtypes of what was given. A weight of another dtype is copied
    by each call. On a CPU, where no product turns 16-bit operands into fp32, autocast changes
    nothing.

    Cost, NVH being rows * V * H: 2NVH forward; 6NVH backward on the rows that have a gradient. With
    a frozen head (weight, bias and lora without gradient) 4NVH in all, and no GEMM in the backward.
    A trained `lora` costs 2NVH forward and 4NVH backward. With `support` a token costs as many dot
    products as it has ids, up to V / 48 of them, and a token with the whole vocabulary 2VH forward
    and 6VH backward, with a frozen head too. With `sparsity` and `old_logps` 2NVH in
    all; without `old_logps` 2NVH more on rows with a gradient.

    Raises:
        ValueError: for any argument of the wrong shape, dtype, device or value. Second derivatives
            raise RuntimeError, forward-mode derivatives NotImplementedError.
    """
    hidden, weight = autocast.operand(hidden), autocast.operand(weight)
    checks.head(hidden, weight, bias, backend)
    checks.lora(lora, hidden, weight, sparsity)
    checks.no_forward_mode(hidden, weight, bias, *(lora or ()))
    checks.transform(logit_scale, softcap, workspace_mb)
    checks.sparsity(sparsity, seed)
    shape = tuple(hidden.shape[:-1])
    checks.tensor("token_ids", token_ids, shape, like=hidden, dtypes=(torch.int64,))
    checks.ignore_index(ignore_index)
    checks.temperature(temperature, shape, hidden)
    if support is not None:
        check_support(support, shape, hidden, sparsity)
    for name, value in (("seed", seed), ("old_logps", old_logps)):
        if value is not None and not sparsity:
            raise ValueError(f"{name} has no effect with sparsity=0.0")
    if old_logps is not None:
        checks.tensor("old_logps", old_logps, shape, like=hidden, dtypes=checks.FLOATS)
    one_of("entropy", entropy, ("none", "detached", "differentiable"))
    one_of("backend", backend, ("auto", "triton", "torch"))
    ids = token_ids.reshape(-1)
    rows, columns = with_adapter(hidden.reshape(-1, hidden.shape[-1]), lora)
    operands = ops.Operands(
        hidden=rows,
        weight=weight,
        token_ids=ids,
        mask=ids != ignore_index,
        bias=bias,
        lora=columns,
        temperature=temperature_tensor(temperature, hidden),
        support_ids=None if support is None else support.ids,
        support_cu=None if support is None else support.cu,
        logit_scale=float(logit_scale),
        softcap=float(softcap or 0.0),
        workspace_mb=workspace_mb,
        backend=backend,
    )
    estimate = None if old_logps is None else old_logps.detach().reshape(-1)
    scored, _ = score(operands, entropy, sparsity, seed, estimate)
    return TokenLogps(*(None if x is None else x.view(shape) for x in scored))


def score(
    operands: ops.Operands,
    entropy: str,
    sparsity: float,
    seed: int | None,
    estimate: Tensor | None,  # (N,) log-probs of about the same policy
    ids_name: str = "token_ids",
) -> tuple[TokenLogps, Tensor | None]:
    """Return the scores of rows, and `sparse.METRICS` (len, 2) where entries were drawn."""
    hidden, weight, bias = operands.hidden, operands.trained(), operands.bias
    grad = torch.is_grad_enabled()
    head_needs = weight.requires_grad or (bias is not None and bias.requires_grad)
    sparsity = float(sparsity) if grad and (hidden.requires_grad or head_needs) else 0.0
    frozen = grad and hidden.requires_grad and not head_needs
    chosen = sparsity or operands.support_cu is not None  # gradients are sums over some entries
    scores = ops.Scores(*ops.linear_logps(
        **operands._asdict(),
        with_entropy=entropy != "none",
        with_jacobian=frozen and entropy != "differentiable" and not chosen,
        sparsity=sparsity,
        draw_seed=draw_seed(seed, hidden) if sparsity else None,
        old_logps=estimate if sparsity else None,
        ids_name=ids_name,
    ))  # fmt: skip
    entropies = None
    if entropy != "none":
        entropies = scores.entropy.detach() if entropy == "detached" else scores.entropy
    metrics = scores.draw_metrics if len(scores.draw_metrics) else None
    return TokenLogps(scores.logps, entropies, scores.lse), metrics


def draw_seed(seed: int | None, like: Tensor) -> Tensor:
    """Return a seed as the ops take it: () int64 on the device, so that nobody waits for it."""
    if seed is None:
        return torch.randint(2**62, (), device=like.device)
    return torch.full((), seed, dtype=torch.int64, device=like.device)


def temperature_tensor(temperature: float | Tensor, like: Tensor) -> Tensor | None:
    """Return a temperature as the ops take it: (N,), (), or None for 1."""
    if isinstance(temperature, Tensor):
        return temperature.detach().reshape(-1) if temperature.dim() else temperature.detach()
    return None if temperature == 1 else scalar_tensor(temperature, like)


def scalar_tensor(x: float | Tensor | None, like: Tensor) -> Tensor | None:
    """Return a number as a tensor (), in the dtype that results of `like` have."""
    if x is None or isinstance(x, Tensor):
        return x
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.full((), float(x), dtype=dtype, device=like.device)
