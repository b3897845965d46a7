"""`grpo_loss`: the loss of a batch of completions and its gradients, from hidden states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastgrpo import autocast, checks, ops
from fastgrpo.checks import one_of
from fastgrpo.head import sparse
from fastgrpo.logps import Backend, draw_seed, scalar_tensor, score, temperature_tensor
from fastgrpo.low_rank import with_adapter
from fastgrpo.objective.call import LossCall
from fastgrpo.objective.config import LossConfig, config_of_preset
from fastgrpo.objective.metrics import METRICS, Given
from fastgrpo.objective.policy import nearest
from fastgrpo.objective.requirements import check_call, group_ids
from fastgrpo.support import Support, check_support


class GRPOLoss(NamedTuple):
    """What `grpo_loss` returns."""

    loss: Tensor
    """() fp32, differentiable in hidden, weight, bias and lora."""
    logps: Tensor
    """As completion_ids, fp32, nats, detached: the next epoch's old_logps. 0 where masked."""
    entropy: Tensor | None
    """As completion_ids, fp32, nats, as `LossConfig.entropy` asks."""
    metrics: dict[str, Tensor]
    """Detached scalars on the device. Each is a mean over `<name>_count` tokens, and calls combine
    as means do, weighted by these counts. `_min` and `_max` are extrema instead, and `ess` is
    importance_mean^2 / importance_square."""


def grpo_loss(
    hidden: Tensor,  # (B, T, H), or packed (N, H) with cu_seqlens
    weight: Tensor,  # (V, H)
    completion_ids: Tensor,  # (B, T) or (N,) int64
    completion_mask: Tensor | None,  # (B, T) bool; packed: (N,) bool or None for all
    advantages: Tensor,  # (B,), or per token (B, T) / (N,)
    *,
    old_logps: Tensor | None = None,  # as completion_ids
    ref_logps: Tensor | None = None,  # as completion_ids
    sampler_logps: Tensor | None = None,  # as completion_ids
    support: Support | None = None,  # of tokens as completion_ids
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32
    group_ids_or_size: Tensor | int | None = None,  # (B,) int64, or G
    entropy_threshold: float | Tensor | None = None,
    normalizer: float | int | Tensor | None = None,
    config: str | LossConfig = "grpo",
    bias: Tensor | None = None,  # (V,)
    lora: tuple[Tensor, Tensor] | None = None,  # (R, H), (V, R)
    temperature: float | Tensor = 1.0,  # (), or as completion_ids
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_mb: float | None = None,
    backend: Backend = "auto",
    skip_zero_advantage: bool = False,
    sparsity: float = 0.0,
    seed: int | None = None,
) -> GRPOLoss:
    """Return the loss of a batch of completions; `loss.backward()` costs no GEMM with V.

    Equivalent to, for the preset "grpo" (A is the advantage, d = ref_logps - logps):

        logps = linear_logps(hidden, weight, completion_ids, ...).logps
        ratio = exp(logps - old_logps)
        loss = -min(ratio * A, ratio.clip(1 - epsilon_low, 1 + epsilon_high) * A)
        loss = loss + beta * (exp(d) - d - 1)
        loss = mean over sequences of the mean over their unmasked tokens

    Args:
        hidden: (B, T, H) or packed (N, H); hidden[b, t] is the state that predicts
            completion_ids[b, t]. bf16, fp16, fp32; fp64 on the torch backend.
        weight: (V, H), in hidden's dtype or fp32.
        completion_ids: (B, T) or (N,) int64 in [0, V) where unmasked.
        completion_mask: bool. Masked positions may hold anything in every tensor, NaN and ids out
            of range too: they change neither the loss nor any gradient.
        advantages: (B,) fp32 or per token.
        old_logps: log-probs when the completions were sampled; None: on-policy, the ratio is 1 in
            value and has its gradient.
        ref_logps: log-probs of the reference policy, required if config.beta > 0.
        sampler_logps: log-probs that the inference engine reported, for `correction`, `rejection`,
            `off_policy_mask_threshold`, `anchor`="sampler", and the metrics. A NaN, where it has
            none, counts as ratio 1: weight 1, never rejected, no evidence of being off-policy.
        support: the ids that each token was drawn from, in the layout of completion_ids, as in
            `linear_logps`: the loss, its entropies, metrics and gradients are those of the softmax
            over these. old_logps, ref_logps and sampler_logps are to be of the same ids.
        cu_seqlens: (B + 1,) int32 bounds of packed sequences, from 0 to N.
        group_ids_or_size: each completion's prompt, for aggregation "prompt_mean", as in
            `group_advantages`. A prompt's completions belong in one call, which on a GPU waits for
            the host once more.
        entropy_threshold: nats; stands in for the quantile that `top_entropy_quantile` takes over
            this call's tokens, where the population is larger than a call.
        normalizer: the denominator itself, counted over the whole optimizer step: tokens for a mean
            over tokens, sequences for a mean over sequences, prompts for a mean over prompts,
            B * max_completion_length for the fixed length (`count_normalizer`). Where gradients are
            averaged over ranks, divide it by their number. None: counted in this call.
        config: a preset's name or a `LossConfig`.
        bias, lora, temperature, logit_scale, softcap, workspace_mb, backend: as in `linear_logps`.
        skip_zero_advantage: do not even score tokens with advantage 0, which have no gradient here:
            2NVH less for each. Loss and gradients are the same; their log-probs and entropies are
            returned as 0, and metrics are means over the others.
        sparsity: 0 gives exact gradients, tau in (0, 1) unbiased ones at the price of the forward,
            as in `linear_logps`. The loss, log-probs and metrics stay exact. Entries are drawn by
            the first given one of old_logps, sampler_logps and ref_logps, or without any in a
            second pass.
        seed: of what `sparsity` and surrogate "clip_cov" draw: one for each call and rank. None:
            PyTorch's generator.

    Gradients reach hidden, weight, bias and lora. Advantages, log-probs that are given and
    normalizer are constants, whether or not they require a gradient.

    Autocast acts on hidden and weight as in `linear_logps`.

    Metrics, means over unmasked tokens unless said otherwise:
        ratio_mean, ratio_min, ratio_max   of the ratio at its level
        clip_low, clip_high, clip_region   share held by a lower bound, an upper one, either
        approx_kl, kl, sampler_kl          k3 estimates from old_logps (sampled), to ref_logps, from
                                           sampler_logps (sampled; where not NaN)
        importance_mean, importance_square of w = ratio * correction, and of w^2
        ess                                effective sample size as a share of tokens:
                                           mean(w)^2 / mean(w^2)
        correction_mean, correction_clipped, rejected   weight; share out of bounds; share dropped
        live_rows                          share with a gradient
        entropy                            if it is computed
        kept_entries, kept_entries_max     entries of a row that its sparse gradient is made of, all
                                           slots of a row that overflows
        overflow_rows                      share whose gradient is dense, as they kept too many
        variance_bound_max                 bounds what sparsity adds to the variance of sampling a
                                           token, as a share of it: tau' / (1 - tau'), where tau' is
                                           what a row's estimate made of tau
                                           (these four: over the rows for which this call drew
                                           entries, not a backward of its own)

    What is not finite at an unmasked token, and read by the loss, makes the loss and every gradient
    not finite. Tokens that `skip_zero_advantage` leaves out are not read.

    Raises:
        ValueError: for any argument of the wrong shape, dtype, device or value, and for options
            without effect. Second derivatives raise RuntimeError, forward-mode derivatives
            NotImplementedError.
    """
    config = config_of_preset(config) if isinstance(config, str) else config
    hidden, weight = autocast.operand(hidden), autocast.operand(weight)
    checks.head(hidden, weight, bias, backend)
    checks.lora(lora, hidden, weight, sparsity)
    checks.no_forward_mode(hidden, weight, bias, *(lora or ()))
    checks.transform(logit_scale, softcap, workspace_mb)
    checks.sparsity(sparsity, seed)
    one_of("backend", backend, ("auto", "triton", "torch"))
    if not isinstance(config, LossConfig):
        raise ValueError(f"config: expected a preset's name or a LossConfig, got {config!r}")
    call = LossCall(
        cu_seqlens=cu_seqlens,
        advantages=advantages,
        old_logps=old_logps,
        ref_logps=ref_logps,
        sampler_logps=sampler_logps,
        groups=group_ids_or_size,
        entropy_threshold=entropy_threshold,
        normalizer=normalizer,
        seed=seed,
        config_key=config.key,
    )
    mask = _check_tokens(hidden, completion_ids, completion_mask, temperature, call)
    if support is not None:
        check_support(support, tuple(completion_ids.shape), hidden, sparsity)
    check_call(config, call, hidden, sparsity, skip_zero_advantage)
    call = _flat(call, hidden)
    rows, columns = with_adapter(hidden.reshape(-1, hidden.shape[-1]), lora)
    operands = ops.Operands(
        hidden=rows,
        weight=weight,
        token_ids=completion_ids.detach().reshape(-1),
        mask=mask.detach().reshape(-1),
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
    if config.entropy == "differentiable":
        # Gradients of the entropy that the caller sends back can only be made in the backward.
        estimate = nearest(call.old_logps, call.sampler_logps, call.ref_logps)
        scored, drawn = score(
            operands, "differentiable", sparsity, seed, estimate, ids_name="completion_ids"
        )
        loss, _, _, metrics = ops.policy_loss(
            scored.logps, scored.entropy, operands.mask, **call._asdict(), backend=backend
        )
        logps, entropy = scored.logps.detach(), scored.entropy
        metrics = metrics if drawn is None else torch.cat([metrics, drawn])
    else:
        grad = torch.is_grad_enabled()
        differentiable = (operands.hidden, operands.trained(), bias)
        needs = [grad and x is not None and x.requires_grad for x in differentiable]
        sparsity = float(sparsity) if any(needs) else 0.0
        loss, logps, entropy, metrics, *_ = ops.grpo_loss(
            **operands._asdict(),
            **call._asdict(),
            need_hidden=needs[0],
            need_weight=needs[1],
            need_bias=needs[2],
            skip_zero_advantage=skip_zero_advantage,
            sparsity=sparsity,
            draw_seed=draw_seed(seed, hidden) if sparsity else None,
        )
    shape = completion_ids.shape
    given = Given(ref_logps is not None, sampler_logps is not None)
    return GRPOLoss(
        loss,
        logps.view(shape),
        entropy.view(shape) if config.entropy != "none" else None,
        _named(metrics, config, given),
    )


class FusedGRPOLoss(nn.Module):
    """`grpo_loss` with its configuration held: call it with the tensors.

    Args:
        config: a preset's name or a `LossConfig`.
        **options: keyword arguments of `grpo_loss` to hold as well, such as temperature or softcap.
    """

    def __init__(self, config: str | LossConfig = "grpo", **options: object) -> None:
        super().__init__()
        self.config = LossConfig.preset(config) if isinstance(config, str) else config
        if not isinstance(self.config, LossConfig):
            raise ValueError(f"config: expected a preset's name or a LossConfig, got {config!r}")
        known = set(grpo_loss.__kwdefaults__) - {"config"}
        for name in options:
            if name not in known:
                raise ValueError(f"{name}: expected an option of grpo_loss, one of {sorted(known)}")
        self.options = options

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor | None,
        advantages: Tensor,
        **tensors: object,
    ) -> GRPOLoss:
        options = {**self.options, **tensors, "config": self.config}
        return grpo_loss(hidden, weight, completion_ids, completion_mask, advantages, **options)

    def extra_repr(self) -> str:
        return f"{self.config}"


def _check_tokens(
    hidden: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    call: LossCall,
) -> Tensor:
    """Check everything per token or sequence against hidden; return the mask."""
    packed = call.cu_seqlens is not None
    shape = tuple(hidden.shape[:-1])
    if len(shape) != (1 if packed else 2):
        form = "(N, H) with cu_seqlens" if packed else "(B, T, H)"
        raise ValueError(f"hidden: expected shape {form}, got {tuple(hidden.shape)}")
    checks.tensor("completion_ids", ids, shape, like=hidden, dtypes=(torch.int64,))
    if mask is None and not packed:
        raise ValueError("completion_mask: expected a bool tensor (B, T), got None")
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=hidden.device)
    checks.tensor("completion_mask", mask, shape, like=hidden, dtypes=(torch.bool,))
    for name in ("old_logps", "ref_logps", "sampler_logps"):
        if (x := getattr(call, name)) is not None:
            checks.tensor(name, x, shape, like=hidden, dtypes=checks.FLOATS)
    checks.temperature(temperature, shape, hidden)
    if packed:
        checks.bounds(call.cu_seqlens, hidden)
    sequences = len(call.cu_seqlens) - 1 if packed else shape[0]
    checks.tensor("advantages", call.advantages, like=hidden, dtypes=checks.FLOATS)
    if tuple(call.advantages.shape) not in ((sequences,), shape):
        raise ValueError(
            f"advantages: expected shape {(sequences,)} or {shape}, "
            f"got {tuple(call.advantages.shape)}"
        )
    return mask


def _flat(call: LossCall, hidden: Tensor) -> LossCall:
    """Return a call as the ops take it: rows (N,), and numbers as tensors."""
    cu_seqlens = call.cu_seqlens
    if cu_seqlens is None:
        sequences, length, _ = hidden.shape
        cu_seqlens = torch.arange(sequences + 1, device=hidden.device) * length

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().reshape(-1)

    return call._replace(
        cu_seqlens=cu_seqlens,
        advantages=rows(call.advantages),
        old_logps=rows(call.old_logps),
        ref_logps=rows(call.ref_logps),
        sampler_logps=rows(call.sampler_logps),
        groups=group_ids(call.groups, len(cu_seqlens) - 1, hidden),
        entropy_threshold=scalar_tensor(call.entropy_threshold, hidden),
        normalizer=scalar_tensor(call.normalizer, hidden),
    )


def _named(metrics: Tensor, config: LossConfig, given: Given) -> dict[str, Tensor]:
    """Return the metrics that this call has something to tell of, with their counts."""
    reported = [metric.reported(config, given) for metric in METRICS.values()]
    named = {}
    # A sparse backward adds its own where it drew.
    names = (*METRICS, *sparse.METRICS)[: len(metrics)]
    wanted = reported + [True] * (len(names) - len(reported))
    for name, tell, (value, count) in zip(names, wanted, metrics, strict=True):
        if tell:
            named[name], named[f"{name}_count"] = value, count
    return named
