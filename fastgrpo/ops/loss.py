"""The op of `fastgrpo.grpo_loss`: the whole loss, with its gradients computed in the forward."""

from __future__ import annotations

from collections import namedtuple

import torch
from torch import Tensor
from torch.library import custom_op

from fastgrpo.head import sparse
from fastgrpo.head.gradients import Grads
from fastgrpo.head.plan import Needs, Plan
from fastgrpo.head.routes import loss_and_grads
from fastgrpo.objective.call import LossCall
from fastgrpo.objective.config import config_from_key, needs_entropy
from fastgrpo.objective.metrics import METRICS
from fastgrpo.objective.segments import Sequences
from fastgrpo.ops.operands import Operands, name_of_trained
from fastgrpo.ops.schema import (
    WAITS,
    in_dtypes,
    or_empty,
    parameters,
    refuse_double_backward,
    without_autocast,
)
from fastgrpo.packing import live_first, spread

Losses = namedtuple("Losses", "loss logps entropy metrics dhidden dweight dbias")


@custom_op("fastgrpo::grpo_loss", mutates_args=(), tags=WAITS)
@without_autocast
def grpo_loss(
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
    skip_zero_advantage: bool,
    sparsity: float,  # 0: exact gradients
    draw_seed: Tensor | None,  # () int64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `Losses`.

    The loss is (), logps and entropy are (N,). The metrics are `METRICS` with their counts
    (len, 2); with `sparsity`, `sparse.METRICS` follow. The gradients with respect to hidden, weight
    and bias have the dtypes of these (fp32 for fp16).
    """
    given = Operands(
        hidden, weight, token_ids, mask, bias, lora, temperature, support_ids, support_cu,
        logit_scale, softcap, workspace_mb, backend,
    )  # fmt: skip
    call = LossCall(
        cu_seqlens, advantages, old_logps, ref_logps, sampler_logps, groups, entropy_threshold,
        normalizer, seed, config_key,
    )  # fmt: skip
    n, needs = len(mask), Needs(need_hidden, need_weight, need_bias)
    head, owner = given.head(), Sequences.of(cu_seqlens, mask)
    inert = call.inert(owner) if any(needs) or skip_zero_advantage else None
    where, num_live = live_first(mask, inert)
    if skip_zero_advantage:
        where = where if isinstance(where, slice) else where[:num_live]
    rows = given.rows(where, "completion_ids")
    words = given.words(sparsity, draw_seed, where) if sparsity else None
    kept = given.kept_of(rows, where, "completion_ids")

    def evaluate(plan: Plan) -> tuple:
        objective = call.objective(owner, mask, where, plan.kernels, plan.accumulator)
        return loss_and_grads(objective, rows, head, plan, needs, words, num_live, kept)

    scored, result, grads, drawn = given.run(evaluate, rows, sparse=bool(sparsity))
    metrics = result.metrics if drawn is None else torch.cat([result.metrics, drawn])
    grads = grads._replace(hidden=spread(grads.hidden, where, n))
    _poison(grads, result.loss)
    logps, entropy = spread(scored.logps, where, n), spread(scored.entropy, where, n)
    dtypes = (_kept(dtype) for dtype in given.dtypes())
    results = Losses(result.loss, logps, entropy, metrics, *in_dtypes(grads, dtypes))
    return or_empty(results, logps)


@grpo_loss.register_fake
def _(hidden, weight, token_ids, mask, bias, lora, temperature, support_ids, support_cu,
      logit_scale, softcap, workspace_mb, backend, cu_seqlens, advantages, old_logps, ref_logps,
      sampler_logps, groups, entropy_threshold, normalizer, seed, config_key, need_hidden,
      need_weight, need_bias, skip_zero_advantage, sparsity, draw_seed):  # fmt: skip
    dtype, n = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    metrics = len(METRICS) + (len(sparse.METRICS) if sparsity else 0)

    def new(*size: int) -> Tensor:
        return hidden.new_empty(size, dtype=dtype)

    def gradient(x: Tensor, needed: bool) -> Tensor:
        return torch.empty_like(x, dtype=_kept(x.dtype)) if needed else new(0)

    return tuple(Losses(
        loss=new(),
        logps=new(n),
        entropy=new(n if needs_entropy(config_from_key(config_key)) else 0),
        metrics=new(metrics, 2),
        dhidden=gradient(hidden, need_hidden),
        dweight=gradient(weight if lora is None else lora, need_weight),
        dbias=gradient(bias, need_bias),
    ))  # fmt: skip


_GRPOLoss = parameters(grpo_loss._init_fn)


def _grpo_loss_setup(ctx, inputs, output) -> None:
    given, results = _GRPOLoss(*inputs), Losses(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(x for name, x in results._asdict().items() if name != "loss"))
    ctx.dtypes = Operands(*(getattr(given, name) for name in Operands._fields)).dtypes()
    ctx.needs = Needs(given.need_hidden, given.need_weight, given.need_bias)
    ctx.trained = name_of_trained(given.lora)
    ctx.save_for_backward(results.dhidden, results.dweight, results.dbias)


def _grpo_loss_backward(ctx, dloss, *_):
    refuse_double_backward()
    if dloss is None:
        return tuple(_GRPOLoss())
    made = Grads(*ctx.saved_tensors)
    grads = Grads(*(
        _scaled(grad, dloss, dtype) if need else None
        for grad, need, dtype in zip(made, ctx.needs, ctx.dtypes, strict=True)
    ))  # fmt: skip
    named = {"hidden": grads.hidden, ctx.trained: grads.weight, "bias": grads.bias}
    return tuple(_GRPOLoss(**named))


grpo_loss.register_autograd(_grpo_loss_backward, setup_context=_grpo_loss_setup)


def _poison(grads: Grads, loss: Tensor) -> None:
    """Make the gradients non-finite if the loss is: a row without a gradient would not do it."""
    for grad in grads:
        if grad is not None and grad.numel():
            # The last column too: with an adapter it is the adapter's.
            for index in (0, -1):
                grad[(index,) * grad.dim()].add_(0.0 * loss)


def _kept(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return fp32 for fp16: its gradients are rounded only after a loss scaler has scaled them."""
    return torch.float32 if dtype == torch.float16 else dtype


def _scaled(grad: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    # Out of place, so that a second backward sees the same gradients. In the last backward, and on
    # a CPU, where reading the factor costs nothing, a factor of 1 saves the copy. Tensors of a
    # tracer (subclasses) have no value to read.
    last = not torch._C._autograd._get_current_graph_task_keep_graph()
    if last and type(by) is Tensor and by.device.type == "cpu" and by.item() == 1:
        return grad.to(dtype)
    return (grad * by).to(dtype)
