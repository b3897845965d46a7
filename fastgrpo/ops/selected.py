"""The ops of `fastgrpo.selected_logps`.

selected_logps       log-probs of K ids per row, lse, entropy, sum of squared probabilities
selected_logps_bwd   its backward: recomputes the logits of the rows that have a gradient
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from fastgrpo.head import selected
from fastgrpo.head.gradients import Grads
from fastgrpo.head.plan import Needs, Plan
from fastgrpo.head.selected import SelectedScores, SelectedUpstream
from fastgrpo.ops.operands import Operands
from fastgrpo.ops.schema import (
    WAITS,
    in_dtypes,
    or_empty,
    parameters,
    refuse_double_backward,
    spoiled,
    without_autocast,
)
from fastgrpo.packing import spread, unmasked


@custom_op("fastgrpo::selected_logps", mutates_args=(), tags=WAITS)
@without_autocast
def selected_logps(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    selected_ids: Tensor,  # (N, K), any id in [0, V) where nothing is chosen
    chosen: Tensor,  # (N, K) bool
    bias: Tensor | None,  # (V,)
    temperature: Tensor | None,  # (N,) or (), None = 1
    logit_scale: float,
    softcap: float,
    workspace_mb: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `SelectedScores`; a row without a chosen id has 0 in all of them."""
    mask = chosen.any(1)
    given = Operands(
        hidden, weight, selected_ids, mask, bias, None, temperature, None, None,
        logit_scale, softcap, workspace_mb, backend,
    )  # fmt: skip
    n, where = len(mask), unmasked(mask)
    rows, head = given.rows(where, "selected_ids"), given.head()

    def score(plan: Plan) -> SelectedScores:
        return selected.logps_fwd(rows, head, plan, chosen[where])

    # Kernels of a few entries run, as in a sparse backward.
    return tuple(spread(x, where, n) for x in given.run(score, rows, sparse=True))


@selected_logps.register_fake
def _(hidden, weight, selected_ids, chosen, bias, temperature, logit_scale, softcap, workspace_mb,
      backend):  # fmt: skip
    dtype, n = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    sizes = SelectedScores(selected_ids.shape, (n,), (n,), (n,))
    return tuple(hidden.new_empty(size, dtype=dtype) for size in sizes)


_SelectedLogps = parameters(selected_logps._init_fn)
_TENSORS = ("hidden", "weight", "selected_ids", "chosen", "bias", "temperature")
_OPTIONS = ("logit_scale", "softcap", "workspace_mb", "backend")
_RESULTS = ("logps", "lse", "entropy")


def _selected_logps_setup(ctx, inputs, output) -> None:
    given, results = _SelectedLogps(*inputs), SelectedScores(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(results.sum_squares)
    ctx.options = {name: getattr(given, name) for name in _OPTIONS}
    ctx.save_for_backward(
        *(getattr(given, name) for name in _TENSORS),
        *(getattr(results, name) for name in _RESULTS),
    )


def _selected_logps_backward(ctx, dlogps, dlse, dentropy, *_):
    refuse_double_backward()
    if dlogps is None and dlse is None and dentropy is None:
        return tuple(_SelectedLogps())
    saved = dict(zip(_TENSORS + _RESULTS, ctx.saved_tensors, strict=True))
    needs = _SelectedLogps(*ctx.needs_input_grad)
    dhidden, dweight, dbias = selected_logps_bwd(
        **saved,
        **ctx.options,
        dlogps=torch.zeros_like(saved["logps"]) if dlogps is None else dlogps.contiguous(),
        dlse=torch.zeros_like(saved["lse"]) if dlse is None else dlse.contiguous(),
        dentropy=None if dentropy is None else dentropy.contiguous(),
        need_hidden=needs.hidden,
        need_weight=needs.weight,
        need_bias=needs.bias,
    )
    return tuple(_SelectedLogps(
        hidden=dhidden if needs.hidden else None,
        weight=dweight if needs.weight else None,
        bias=dbias if needs.bias else None,
    ))  # fmt: skip


selected_logps.register_autograd(_selected_logps_backward, setup_context=_selected_logps_setup)


@custom_op("fastgrpo::selected_logps_bwd", mutates_args=(), tags=WAITS)
@without_autocast
def selected_logps_bwd(
    hidden: Tensor,
    weight: Tensor,
    selected_ids: Tensor,
    chosen: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    logit_scale: float,
    softcap: float,
    workspace_mb: float | None,
    backend: str,
    logps: Tensor,  # (N, K)
    lse: Tensor,  # (N,)
    entropy: Tensor,  # (N,)
    dlogps: Tensor,  # (N, K)
    dlse: Tensor,  # (N,)
    dentropy: Tensor | None,  # (N,)
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to hidden, weight and bias, in their dtypes."""
    dlogps = spoiled(dlogps.masked_fill(~chosen, 0.0), logps)
    alive = (dlogps != 0).any(1) | (dlse != 0)
    if dentropy is not None:
        alive |= dentropy != 0
    mask = chosen.any(1) & alive
    given = Operands(
        hidden, weight, selected_ids, mask, bias, None, temperature, None, None,
        logit_scale, softcap, workspace_mb, backend,
    )  # fmt: skip
    n, where, needs = len(mask), unmasked(mask), Needs(need_hidden, need_weight, need_bias)
    rows, head = given.rows(where, "selected_ids"), given.head()
    scored = SelectedScores(logps[where], lse[where], entropy[where], None)

    upstream = SelectedUpstream(
        dlogps[where], dlse[where], None if dentropy is None else dentropy[where]
    )

    def differentiate(plan: Plan) -> Grads:
        return selected.logps_bwd(rows, head, plan, chosen[where], scored, upstream, needs)

    grads = given.run(differentiate, rows, sparse=True)
    grads = grads._replace(hidden=spread(grads.hidden, where, n))
    return or_empty(in_dtypes(grads, given.dtypes()), hidden)


@selected_logps_bwd.register_fake
def _(hidden, weight, selected_ids, chosen, bias, temperature, logit_scale, softcap, workspace_mb,
      backend, logps, lse, entropy, dlogps, dlse, dentropy, need_hidden, need_weight,
      need_bias):  # fmt: skip
    given = ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    return tuple(torch.empty_like(x) if need else hidden.new_empty(0) for x, need in given)
