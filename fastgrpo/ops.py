"""The ops that autograd and `torch.compile` see, registered with `torch.library`.

    linear_logps       log-probs, lse and entropy of rows; frozen head: also their Jacobian
    linear_logps_bwd   its gradient, recomputed from the lse on the rows that have one
    grpo_loss          the whole loss; its gradients are made here, in the forward
    policy_loss        the loss from given log-probs

All of them take rows (N, ...) with a mask. Masked rows are dropped before anything is computed, so
that their content never matters. What is not asked for comes back as an empty tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor
from torch.library import custom_op

from fastgrpo import checks
from fastgrpo.backend import resolve
from fastgrpo.head import sparse
from fastgrpo.head.loops import logps_bwd, logps_fwd
from fastgrpo.head.plan import Head, Logps, Needs, Rows, Upstream, plan
from fastgrpo.head.routes import logps_and_jacobian, loss_and_grads
from fastgrpo.objective.aggregation import token_weights
from fastgrpo.objective.config import LossConfig, config_from_key, needs_entropy
from fastgrpo.objective.corrections import sampler_gap, sampler_weights
from fastgrpo.objective.policy import METRICS, PolicyRows, policy_loss
from fastgrpo.objective.requirements import check_normalizer
from fastgrpo.objective.segments import Sequences
from fastgrpo.packing import Index, live_first, spread, unmasked
from fastgrpo_kernels import Kept


def _without_autocast(fn: Callable) -> Callable:
    """Autocast would round fp32 operands to 16 bits inside the op."""

    @functools.wraps(fn)
    def wrapped(first: Tensor, *args, **kwargs):
        with torch.autocast(first.device.type, enabled=False):
            return fn(first, *args, **kwargs)

    return wrapped


# ---- linear_logps ------------------------------------------------------------------------------


@custom_op("fastgrpo::linear_logps", mutates_args=())
@_without_autocast
def linear_logps(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (N,)
    mask: Tensor,  # (N,) bool
    bias: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (N,) or (), None = 1
    logit_scale: float,
    softcap: float,
    with_entropy: bool,
    with_jacobian: bool,
    workspace_mb: float | None,
    sparsity: float,  # 0: an exact backward
    draw_seed: Tensor | None,  # () int64
    old_logps: Tensor | None,  # (N,): keep the entries of a sparse backward in this pass
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return logps (N,), lse (N,), entropy (N,), dlogps/dhidden (N, H); with `old_logps` what
    `sparse.Entries` holds, (N, K), (N, K), (N,), (N,), and `sparse.METRICS` (len, 2)."""
    impl = resolve(hidden.device, backend)
    head, budget = _head(weight, bias, logit_scale, softcap), plan(hidden, weight, workspace_mb)
    where = unmasked(mask)
    rows = _rows(hidden, "token_ids", token_ids, temperature, where, len(weight))
    jacobian, drawn, metrics = None, (None,) * 4, None
    if with_jacobian:
        scored, jacobian = logps_and_jacobian(impl, rows, head, budget, with_entropy)
    elif old_logps is None:
        scored = logps_fwd(impl, rows, head, budget, with_entropy)
    else:
        draw = sparse.Draw.of(sparsity, draw_seed, len(mask), len(weight))[where]
        estimate = old_logps[where].to(budget.accumulator)
        scored, entries = sparse.logps_and_entries(
            impl, rows, head, budget, with_entropy, draw, estimate
        )
        drawn, metrics = (*entries.kept, entries.anchor), sparse.metrics(entries, scored)
    results = (spread(x, where, len(mask)) for x in (*scored, jacobian, *drawn))
    return _or_empty((*results, metrics), scored.logps)


@linear_logps.register_fake
def _(hidden, weight, token_ids, mask, bias, temperature, logit_scale, softcap, with_entropy,
      with_jacobian, workspace_mb, sparsity, draw_seed, old_logps, backend):  # fmt: skip
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    n, drawn = hidden.shape[0], old_logps is not None
    kept = (n, sparse.slots(sparsity, weight.shape[0])) if drawn else (0,)
    sizes = ((n,), (n,), (n if with_entropy else 0,), hidden.shape if with_jacobian else (0,))
    sizes += (kept, kept, (n if drawn else 0,), (n if drawn else 0,))
    dtypes = [dtype] * len(sizes)
    if drawn:
        dtypes[4] = dtypes[6] = torch.int32
    return (
        *(hidden.new_empty(size, dtype=d) for size, d in zip(sizes, dtypes, strict=True)),
        hidden.new_empty((len(sparse.METRICS), 2) if drawn else (0,), dtype=dtype),
    )


def _linear_logps_setup(ctx, inputs, output) -> None:
    (*tensors, scale, softcap, with_entropy, with_jacobian, workspace_mb, sparsity, draw_seed, _,
     backend) = inputs  # fmt: skip
    logps, lse, entropy, jacobian, *entries, metrics = output
    ctx.set_materialize_grads(False)
    no_gradient = (lse, jacobian, *entries, metrics)
    ctx.mark_non_differentiable(*no_gradient, *([] if with_entropy else [entropy]))
    ctx.with_jacobian, ctx.dtype = with_jacobian, tensors[0].dtype
    ctx.options = (scale, softcap, workspace_mb, sparsity, backend)
    saved = [jacobian] if with_jacobian else [*tensors, logps, lse, entropy, draw_seed]
    ctx.save_for_backward(*saved, *([] if with_jacobian else entries))


def _linear_logps_backward(ctx, dlogps, dlse, dentropy, *_):
    _refuse_double_backward()
    nothing = (None,) * 15
    if dlogps is None and dentropy is None:
        return nothing
    if ctx.with_jacobian:
        (jacobian,) = ctx.saved_tensors
        return ((jacobian * dlogps[:, None]).to(ctx.dtype), *nothing[1:])
    *tensors, logps, lse, entropy, draw_seed = ctx.saved_tensors[:-4]
    entries = ctx.saved_tensors[-4:]
    scale, softcap, workspace_mb, sparsity, backend = ctx.options
    need_hidden, need_weight, _, _, need_bias, *_ = ctx.needs_input_grad
    dlogps = torch.zeros_like(lse) if dlogps is None else dlogps.contiguous()
    dentropy = None if dentropy is None else dentropy.contiguous()
    dhidden, dweight, dbias = linear_logps_bwd(
        *tensors, scale, softcap, logps, lse, entropy, dlogps, dentropy,
        need_hidden, need_weight, need_bias, workspace_mb, sparsity, draw_seed, *entries, backend,
    )  # fmt: skip
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        None,
        None,
        dbias if need_bias else None,
        *nothing[5:],
    )


linear_logps.register_autograd(_linear_logps_backward, setup_context=_linear_logps_setup)


@custom_op("fastgrpo::linear_logps_bwd", mutates_args=())
@_without_autocast
def linear_logps_bwd(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    logit_scale: float,
    softcap: float,
    logps: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    entropy: Tensor,  # (N,), or empty
    dlogps: Tensor,  # (N,)
    dentropy: Tensor | None,  # (N,)
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    workspace_mb: float | None,
    sparsity: float,
    draw_seed: Tensor | None,  # () int64
    kept_ids: Tensor,  # (N, K) int32, or empty, as the next ones: the entries are drawn here
    kept_logits: Tensor,  # (N, K)
    kept_count: Tensor,  # (N,) int32
    anchor: Tensor,  # (N,)
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, in their dtypes."""
    where = unmasked(mask & Upstream(dlogps, dentropy).alive())
    impl = resolve(hidden.device, backend)
    rows = _rows(hidden, "token_ids", token_ids, temperature, where, len(weight))
    head, budget = _head(weight, bias, logit_scale, softcap), plan(hidden, weight, workspace_mb)
    scored = Logps(logps[where], lse[where], entropy[where] if len(entropy) else None)
    upstream = Upstream(dlogps[where], None if dentropy is None else dentropy[where])
    needs = Needs(need_hidden, need_weight, need_bias)
    if not sparsity:
        grads = logps_bwd(impl, rows, head, budget, scored, upstream, needs)
    else:
        if len(anchor):
            entries = sparse.Entries(Kept(kept_ids, kept_logits, kept_count), anchor)[where]
        else:
            draw = sparse.Draw.of(sparsity, draw_seed, len(mask), len(weight))[where]
            entries = sparse.entries_of(impl, rows, head, budget, draw, scored)
        grads = sparse.entries_bwd(impl, rows, head, budget, scored, upstream, entries, needs)
    grads = grads._replace(hidden=spread(grads.hidden, where, len(mask)))
    dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    grads = (None if g is None else g.to(d) for g, d in zip(grads, dtypes, strict=True))
    return _or_empty(grads, hidden)


@linear_logps_bwd.register_fake
def _(hidden, weight, token_ids, mask, bias, temperature, logit_scale, softcap, logps, lse,
      entropy, dlogps, dentropy, need_hidden, need_weight, need_bias, workspace_mb, sparsity,
      draw_seed, kept_ids, kept_logits, kept_count, anchor, backend):  # fmt: skip
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias else hidden.new_empty(0),
    )


# ---- grpo_loss ---------------------------------------------------------------------------------


@custom_op("fastgrpo::grpo_loss", mutates_args=())
@_without_autocast
def grpo_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    completion_ids: Tensor,  # (N,)
    mask: Tensor,  # (N,) bool
    bias: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (N,) or (), None = 1
    logit_scale: float,
    softcap: float,
    cu_seqlens: Tensor,  # (B + 1,)
    advantages: Tensor,  # (B,) or (N,)
    old_logps: Tensor | None,  # (N,)
    ref_logps: Tensor | None,  # (N,)
    sampler_logps: Tensor | None,  # (N,)
    groups: Tensor | None,  # (B,) int64
    entropy_threshold: Tensor | None,  # ()
    normalizer: Tensor | None,  # ()
    seed: int | None,
    config_key: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    workspace_mb: float | None,
    skip_zero_advantage: bool,
    sparsity: float,  # 0: exact gradients
    draw_seed: Tensor | None,  # () int64
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss (), logps (N,), entropy (N,), `METRICS` with their counts (len, 2), with
    `sparsity` followed by `sparse.METRICS`, and the gradients of hidden, weight and bias, in their
    dtypes (fp32 for fp16)."""
    config, needs = config_from_key(config_key), Needs(need_hidden, need_weight, need_bias)
    head, budget = _head(weight, bias, logit_scale, softcap), plan(hidden, weight, workspace_mb)
    owner = Sequences.of(cu_seqlens, mask)
    advantages = owner.per_row(advantages)
    impl = resolve(hidden.device, backend)
    inert = (any(needs) or skip_zero_advantage) and config.zero_advantage_is_inert
    inert = inert and (old_logps is not None or not config.corrects_sequences)
    where, live = live_first(mask, advantages == 0 if inert else None)
    if skip_zero_advantage:
        where = where if isinstance(where, slice) else where[:live]
    policy_rows = _policy_rows(
        impl, config, mask, where, owner, advantages, old_logps, ref_logps, sampler_logps, groups,
        normalizer, budget.accumulator,
    )  # fmt: skip
    draw = sparse.Draw.of(sparsity, draw_seed, len(mask), len(weight))[where] if sparsity else None
    scored, result, grads = loss_and_grads(
        impl,
        config,
        _rows(hidden, "completion_ids", completion_ids, temperature, where, len(weight)),
        policy_rows,
        owner.segments(impl, where),
        entropy_threshold,
        seed,
        draw,
        live,
        head,
        budget,
        needs,
    )
    n = len(mask)
    logps, entropy = spread(scored.logps, where, n), spread(scored.entropy, where, n)
    grads = grads._replace(hidden=spread(grads.hidden, where, n))
    dtypes = (_kept(hidden.dtype), _kept(weight.dtype), None if bias is None else _kept(bias.dtype))
    grads = (None if g is None else g.to(d) for g, d in zip(grads, dtypes, strict=True))
    return _or_empty((result.loss, logps, entropy, result.metrics, *grads), logps)


@grpo_loss.register_fake
def _(hidden, weight, completion_ids, mask, bias, temperature, logit_scale, softcap, cu_seqlens,
      advantages, old_logps, ref_logps, sampler_logps, groups, entropy_threshold, normalizer, seed,
      config_key, need_hidden, need_weight, need_bias, workspace_mb, skip_zero_advantage, sparsity,
      draw_seed, backend):  # fmt: skip
    config = config_from_key(config_key)
    dtype, n = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    metrics = len(METRICS) + (len(sparse.METRICS) if sparsity else 0)
    sizes = ((), n, n if needs_entropy(config) else 0, (metrics, 2))
    wanted = ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    return (
        *(hidden.new_empty(size, dtype=dtype) for size in sizes),
        *(torch.empty_like(x, dtype=_kept(x.dtype)) if need else hidden.new_empty(0, dtype=dtype)
          for x, need in wanted),
    )  # fmt: skip


def _grpo_loss_setup(ctx, inputs, output) -> None:
    hidden, weight, _, _, bias, *_ = inputs
    _, *rest = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*rest)
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.needs = inputs[18:21]
    ctx.save_for_backward(*rest[-3:])


def _grpo_loss_backward(ctx, dloss, *_):
    _refuse_double_backward()
    nothing = (None,) * 26
    if dloss is None:
        return nothing
    dhidden, dweight, dbias = (
        _scaled(grad, dloss, dtype) if need else None
        for grad, need, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
    )
    return (dhidden, dweight, None, None, dbias, *nothing[5:])


grpo_loss.register_autograd(_grpo_loss_backward, setup_context=_grpo_loss_setup)


# ---- policy_loss -------------------------------------------------------------------------------


@custom_op("fastgrpo::policy_loss", mutates_args=())
@_without_autocast
def policy_loss_op(
    logps: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,)
    mask: Tensor,  # (N,) bool
    cu_seqlens: Tensor,  # (B + 1,)
    advantages: Tensor,  # (B,) or (N,)
    old_logps: Tensor | None,  # (N,)
    ref_logps: Tensor | None,  # (N,)
    sampler_logps: Tensor | None,  # (N,)
    groups: Tensor | None,  # (B,) int64
    entropy_threshold: Tensor | None,  # ()
    normalizer: Tensor | None,  # ()
    seed: int | None,
    config_key: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss (), dL/dlogps (N,), dL/dentropy (N,), and `METRICS` with counts (len, 2)."""
    config, where = config_from_key(config_key), unmasked(mask)
    owner, impl = Sequences.of(cu_seqlens, mask), resolve(logps.device, backend)
    policy_rows = _policy_rows(
        impl, config, mask, where, owner, owner.per_row(advantages), old_logps, ref_logps,
        sampler_logps, groups, normalizer, logps.dtype,
    )  # fmt: skip
    packed = logps[where]
    scored = Logps(packed, packed, None if entropy is None else entropy[where])
    segments = owner.segments(impl, where)
    result = policy_loss(impl, config, scored, policy_rows, segments, entropy_threshold, seed)
    upstream = (spread(x, where, len(mask)) for x in result.upstream)
    return _or_empty((result.loss, *upstream, result.metrics), logps)


@policy_loss_op.register_fake
def _(logps, entropy, mask, cu_seqlens, advantages, old_logps, ref_logps, sampler_logps, groups,
      entropy_threshold, normalizer, seed, config_key, backend):  # fmt: skip
    dentropy = logps.shape[0] if config_from_key(config_key).entropy_coef else 0
    sizes = ((), logps.shape[0], dentropy, (len(METRICS), 2))
    return tuple(logps.new_empty(size) for size in sizes)


def _policy_loss_setup(ctx, inputs, output) -> None:
    _, dlogps, dentropy, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(dlogps, dentropy, stats)
    ctx.save_for_backward(dlogps, dentropy)


def _policy_loss_backward(ctx, dloss, *_):
    _refuse_double_backward()
    if dloss is None:
        return (None,) * 14
    dlogps, dentropy = ctx.saved_tensors
    return (dlogps * dloss, dentropy * dloss if len(dentropy) else None, *(None,) * 12)


policy_loss_op.register_autograd(_policy_loss_backward, setup_context=_policy_loss_setup)


# ---- shared by the ops -------------------------------------------------------------------------


def _head(weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float) -> Head:
    return Head(weight, None if bias is None else bias.contiguous(), logit_scale, softcap)


def _rows(
    hidden: Tensor, name: str, ids: Tensor, temperature: Tensor | None, where: Index, vocab: int
) -> Rows:
    """Pick rows and check what only their values tell."""
    # Kernels take one number after the other: a slice of all rows keeps the strides it came with.
    ids = ids[where].contiguous()
    checks.token_ids(name, ids, vocab)
    inverse = None
    if temperature is not None:
        values = temperature[where] if temperature.dim() else temperature.expand(len(ids))
        checks.positive_temperature(values)
        inverse = values.to(torch.promote_types(hidden.dtype, torch.float32)).reciprocal()
    return Rows(hidden[where], ids, inverse)


def _policy_rows(
    impl: ModuleType,
    config: LossConfig,
    mask: Tensor,
    where: Index,
    owner: Sequences,
    advantages: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    sampler_logps: Tensor | None,
    groups: Tensor | None,
    normalizer: Tensor | None,
    dtype: torch.dtype,
) -> PolicyRows:
    """Pick rows of what the loss needs."""
    if normalizer is not None:
        check_normalizer(normalizer)
    sampler = None
    if config.needs_sampler and old_logps is not None:
        # Over all rows in the order of their sequences, which `where` may not keep.
        log_w = sampler_gap(old_logps.to(dtype), sampler_logps.to(dtype)).masked_fill(~mask, 0.0)
        sampler = sampler_weights(config, log_w, owner.all_segments(impl))[where]
    weights = token_weights(config, owner, where, groups, normalizer, dtype)
    given = (advantages, old_logps, ref_logps, sampler_logps)
    advantages, *logps = (None if x is None else x[where].to(dtype).contiguous() for x in given)
    return PolicyRows(advantages, weights, *logps, sampler)


def _kept(dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for fp16, whose gradients are rounded only once a loss scaler has lifted them."""
    return torch.float32 if dtype == torch.float16 else dtype


def _scaled(grad: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    # Out of place, for a second backward. Where looking costs nothing, a factor of 1 saves the
    # copy; a tracer's tensors (subclasses) hold no value to look at.
    if type(by) is Tensor and by.device.type == "cpu" and by.item() == 1:
        return grad.to(dtype)
    return (grad * by).to(dtype)


def _or_empty(results: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An op returns tensors only: empty ones for what was not asked for."""
    return tuple(like.new_empty(0) if x is None else x for x in results)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("fastgrpo ops have no second derivative: create_graph must be False")
