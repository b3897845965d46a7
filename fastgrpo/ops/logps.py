"""The ops of `fastgrpo.linear_logps`.

linear_logps       log-probs, lse and entropy of rows; for a frozen head also dlogp/dhidden
linear_logps_bwd   its backward: recomputes the logits of the rows that have a gradient
"""

from __future__ import annotations

from collections import namedtuple

import torch
from torch import Tensor
from torch.library import custom_op

from fastgrpo.head import sparse, support
from fastgrpo.head.gradients import Grads
from fastgrpo.head.loops import logps_bwd, logps_fwd
from fastgrpo.head.plan import Needs, Plan
from fastgrpo.head.routes import logps_and_jacobian
from fastgrpo.ops.operands import Operands, name_of_trained
from fastgrpo.ops.schema import (
    WAITS,
    in_dtypes,
    or_empty,
    parameters,
    refuse_double_backward,
    spoiled,
    without_autocast,
)
from fastgrpo.packing import entries_of, spread, unmasked
from fastgrpo_kernels import Kept, Logps, Upstream

Scores = namedtuple(
    "Scores",
    "logps lse entropy jacobian kept_ids kept_logits kept_count anchor draw_metrics support_logits",
)


@custom_op("fastgrpo::linear_logps", mutates_args=(), tags=WAITS)
@without_autocast
def linear_logps(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (N,)
    mask: Tensor,  # (N,) bool
    bias: Tensor | None,  # (V,)
    lora: Tensor | None,  # (V, K); then hidden is (N, H + K), and a gradient is lora's
    temperature: Tensor | None,  # (N,) or (), None = 1
    support_ids: Tensor | None,  # (M,)
    support_cu: Tensor | None,  # (N + 1,)
    logit_scale: float,
    softcap: float,
    workspace_mb: float | None,
    backend: str,
    with_entropy: bool,
    with_jacobian: bool,
    sparsity: float,  # 0: an exact backward
    draw_seed: Tensor | None,  # () int64
    old_logps: Tensor | None,  # (N,): given, this pass draws the entries of a sparse backward
    ids_name: str = "token_ids",  # what an error calls them
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `Scores`.

    logps, lse and entropy are (N,), the Jacobian dlogps/dhidden is (N, H). With `old_logps` also
    the fields of `sparse.Entries`, (N, K), (N, K), (N,) and (N,), and `sparse.METRICS` (len, 2).
    With a support its logits (M,), 0 at masked tokens.
    """
    given = Operands(
        hidden, weight, token_ids, mask, bias, lora, temperature, support_ids, support_cu,
        logit_scale, softcap, workspace_mb, backend,
    )  # fmt: skip
    n, where = len(mask), unmasked(mask)
    rows, head = given.rows(where, ids_name), given.head()
    kept = given.kept_of(rows, where, ids_name)

    def score(plan: Plan) -> tuple[Tensor, ...]:
        jacobian, drawn, metrics, logits = None, (None,) * 4, None, None
        if kept is not None:
            scored, logits = support.logps_fwd(rows, head, plan, kept, with_entropy)
            logits = spread(logits, entries_of(support_cu, where)[0], len(support_ids))
        elif with_jacobian:
            scored, jacobian = logps_and_jacobian(rows, head, plan, with_entropy)
        elif old_logps is None:
            scored = logps_fwd(rows, head, plan, with_entropy)
        else:
            words = given.words(sparsity, draw_seed, where)
            estimate = old_logps[where].to(plan.accumulator)
            scored, entries = sparse.logps_and_entries(
                rows, head, plan, with_entropy, words, estimate
            )
            drawn, metrics = (*entries.kept, entries.anchor), sparse.metrics(entries, scored)
        results = (spread(x, where, n) for x in (*scored, jacobian, *drawn))
        return or_empty((*results, metrics, logits), scored.logps)

    return given.run(score, rows, sparse=old_logps is not None)


@linear_logps.register_fake
def _(hidden, weight, token_ids, mask, bias, lora, temperature, support_ids, support_cu,
      logit_scale, softcap, workspace_mb, backend, with_entropy, with_jacobian, sparsity, draw_seed,
      old_logps, ids_name="token_ids"):  # fmt: skip
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    n, drawn = hidden.shape[0], old_logps is not None

    def new(*size: int, dtype: torch.dtype = dtype, wanted: bool = True) -> Tensor:
        return hidden.new_empty(size if wanted else (0,), dtype=dtype)

    slots = sparse.slots(sparsity, weight.shape[0]) if drawn else 0
    return tuple(Scores(
        logps=new(n),
        lse=new(n),
        entropy=new(n, wanted=with_entropy),
        jacobian=new(*hidden.shape, wanted=with_jacobian),
        kept_ids=new(n, slots, dtype=torch.int32 if drawn else dtype, wanted=drawn),
        kept_logits=new(n, slots, wanted=drawn),
        kept_count=new(n, dtype=torch.int32 if drawn else dtype, wanted=drawn),
        anchor=new(n, wanted=drawn),
        draw_metrics=new(len(sparse.METRICS), 2, wanted=drawn),
        support_logits=new(0) if support_ids is None else new(support_ids.shape[0]),
    ))  # fmt: skip


_LinearLogps = parameters(linear_logps._init_fn)
# What the backward takes unchanged: tensors and options given to the forward, and its results.
_TENSORS = (
    "hidden", "weight", "token_ids", "mask", "bias", "lora", "temperature", "support_ids",
    "support_cu", "draw_seed",
)  # fmt: skip
_OPTIONS = ("logit_scale", "softcap", "workspace_mb", "backend", "sparsity")
_RESULTS = (
    "logps", "lse", "entropy", "kept_ids", "kept_logits", "kept_count", "anchor", "support_logits"
)  # fmt: skip


def _linear_logps_setup(ctx, inputs, output) -> None:
    given, results = _LinearLogps(*inputs), Scores(*output)
    differentiable = {"logps", "entropy"} if given.with_entropy else {"logps"}
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(
        *(x for name, x in results._asdict().items() if name not in differentiable)
    )
    ctx.with_jacobian, ctx.dtype = given.with_jacobian, given.hidden.dtype
    ctx.options = {name: getattr(given, name) for name in _OPTIONS}
    if given.with_jacobian:
        ctx.save_for_backward(results.jacobian, results.logps)
    else:
        ctx.save_for_backward(
            *(getattr(given, name) for name in _TENSORS),
            *(getattr(results, name) for name in _RESULTS),
        )


def _linear_logps_backward(ctx, dlogps, dlse, dentropy, *_):
    refuse_double_backward()
    if dlogps is None and dentropy is None:
        return tuple(_LinearLogps())
    if ctx.with_jacobian:
        jacobian, logps = ctx.saved_tensors
        dhidden = jacobian * spoiled(dlogps, logps)[:, None]
        dhidden.masked_fill_((dlogps == 0)[:, None], 0.0)
        return tuple(_LinearLogps(hidden=dhidden.to(ctx.dtype)))
    saved = dict(zip(_TENSORS + _RESULTS, ctx.saved_tensors, strict=True))
    needs, trained = _LinearLogps(*ctx.needs_input_grad), name_of_trained(saved["lora"])
    dhidden, dweight, dbias = linear_logps_bwd(
        **saved,
        **ctx.options,
        dlogps=torch.zeros_like(saved["lse"]) if dlogps is None else dlogps.contiguous(),
        dentropy=None if dentropy is None else dentropy.contiguous(),
        need_hidden=needs.hidden,
        need_weight=getattr(needs, trained),
        need_bias=needs.bias,
    )
    return tuple(_LinearLogps(**{
        "hidden": dhidden if needs.hidden else None,
        trained: dweight if getattr(needs, trained) else None,
        "bias": dbias if needs.bias else None,
    }))  # fmt: skip


linear_logps.register_autograd(_linear_logps_backward, setup_context=_linear_logps_setup)


@custom_op("fastgrpo::linear_logps_bwd", mutates_args=(), tags=WAITS)
@without_autocast
def linear_logps_bwd(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    lora: Tensor | None,
    temperature: Tensor | None,
    support_ids: Tensor | None,
    support_cu: Tensor | None,
    logit_scale: float,
    softcap: float,
    workspace_mb: float | None,
    backend: str,
    logps: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    entropy: Tensor,  # (N,) or empty
    dlogps: Tensor,  # (N,)
    dentropy: Tensor | None,  # (N,)
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    sparsity: float,
    draw_seed: Tensor | None,  # () int64
    # The entries that the forward drew; if these four are empty, they are drawn here.
    kept_ids: Tensor,  # (N, K) int32
    kept_logits: Tensor,  # (N, K)
    kept_count: Tensor,  # (N,) int32
    anchor: Tensor,  # (N,)
    support_logits: Tensor,  # (M,), or empty without a support
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to hidden, weight or lora, and bias, in their dtypes."""
    given = Operands(
        hidden, weight, token_ids, mask, bias, lora, temperature, support_ids, support_cu,
        logit_scale, softcap, workspace_mb, backend,
    )  # fmt: skip
    upstream = Upstream(spoiled(dlogps, logps), dentropy)
    needs = Needs(need_hidden, need_weight, need_bias)
    n, where = len(mask), unmasked(mask & upstream.alive())
    rows, head, upstream = given.rows(where), given.head(), upstream[where]
    # Of no rows an entropy that was asked for is as empty as none.
    scored = Logps(logps, lse, entropy if len(entropy) == n else None)[where]

    kept = given.kept(where, support_logits)

    def differentiate(plan: Plan) -> Grads:
        if kept is not None:
            return support.logps_bwd(rows, head, plan, kept, scored, upstream, needs)
        if not sparsity:
            return logps_bwd(rows, head, plan, scored, upstream, needs)
        if len(anchor):
            entries = sparse.Entries(Kept(kept_ids, kept_logits, kept_count), anchor)[where]
        else:
            words = given.words(sparsity, draw_seed, where)
            entries = sparse.entries_of(rows, head, plan, words, scored)
        return sparse.entries_bwd(rows, head, plan, scored, upstream, entries, needs)

    grads = given.run(differentiate, rows, sparse=bool(sparsity))
    grads = grads._replace(hidden=spread(grads.hidden, where, n))
    return or_empty(in_dtypes(grads, given.dtypes()), hidden)


@linear_logps_bwd.register_fake
def _(hidden, weight, token_ids, mask, bias, lora, temperature, support_ids, support_cu,
      logit_scale, softcap, workspace_mb, backend, logps, lse, entropy, dlogps, dentropy,
      need_hidden, need_weight, need_bias, sparsity, draw_seed, kept_ids, kept_logits, kept_count,
      anchor, support_logits):  # fmt: skip
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight if lora is None else lora) if need_weight else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias else hidden.new_empty(0),
    )
