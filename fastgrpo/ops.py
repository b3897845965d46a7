"""The ops that autograd and `torch.compile` see, registered with `torch.library`.

    linear_logps       log-probs, lse and entropy of rows; for a frozen head also dlogp/dhidden
    linear_logps_bwd   its backward: recomputes the logits of the rows that have a gradient
    grpo_loss          the whole loss, with its gradients computed in the forward
    policy_loss        the loss from given log-probs

All of them take rows (N, ...) with a mask. Masked rows are dropped before anything is computed, so
that their content never matters. A result that is not asked for is an empty tensor.

The schema of an op is a flat list of tensors and numbers. This module converts between it and the
named tuples of the package.
"""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op

from fastgrpo import checks
from fastgrpo.backend import Kernels
from fastgrpo.dispatch import choice
from fastgrpo.head import sparse, support
from fastgrpo.head.gradients import Grads
from fastgrpo.head.loops import logps_bwd, logps_fwd
from fastgrpo.head.plan import Needs, Plan
from fastgrpo.head.routes import logps_and_jacobian, loss_and_grads
from fastgrpo.objective.call import LossCall
from fastgrpo.objective.config import config_from_key, needs_entropy
from fastgrpo.objective.metrics import METRICS
from fastgrpo.objective.policy import PolicyLoss
from fastgrpo.objective.segments import Sequences
from fastgrpo.packing import Index, entries_of, live_first, spread, unmasked
from fastgrpo_kernels import Head, Kept, Logps, Rows, Upstream

Result = TypeVar("Result")
WAITS = (torch.Tag.cudagraph_unsafe,)  # the host counts rows: no compiled graph holds these ops


def without_autocast(fn: Callable) -> Callable:
    """Disable autocast in an op: it would round fp32 operands to 16 bits."""

    @functools.wraps(fn)
    def wrapped(first: Tensor, *args, **kwargs):
        with torch.autocast(first.device.type, enabled=False):
            return fn(first, *args, **kwargs)

    return wrapped


class Operands(NamedTuple):
    """Rows and head: the first parameters of every op that scores rows."""

    hidden: Tensor  # (N, H), or (N, H + K) with lora
    weight: Tensor  # (V, H)
    token_ids: Tensor  # (N,), or (N, K) of several ids
    mask: Tensor  # (N,) bool
    bias: Tensor | None  # (V,)
    lora: Tensor | None  # (V, K): the columns of the weight beyond H
    temperature: Tensor | None  # (N,) or (), None = 1
    support_ids: Tensor | None  # (M,): the kept ids of all rows, as `Support.ids`
    support_cu: Tensor | None  # (N + 1,)
    logit_scale: float
    softcap: float
    workspace_mb: float | None
    backend: str

    def run(self, work: Callable[[Plan], Result], rows: Rows, sparse: bool) -> Result:
        """Return `work` of a plan for these rows, with the best kernels that can be launched."""

        def planned(kernels: Kernels) -> Result:
            return work(Plan.of(self.hidden, self.weight, self.workspace_mb, kernels))

        mode = "sparse" if sparse else "dense" if self.support_cu is None else "support"
        return choice.run(planned, self.backend, self.hidden, (rows, self.head()), mode)

    def head(self) -> Head:
        bias = None if self.bias is None else self.bias.contiguous()
        return Head(self.weight, bias, self.logit_scale, self.softcap, self.lora)

    def rows(self, where: Index, ids_name: str = "token_ids") -> Rows:
        """Select rows and check their values (token ids, temperatures)."""
        # The kernels need adjacent ids; the index may be a slice, which keeps the strides.
        ids = self.token_ids[where].contiguous()
        checks.token_ids(ids_name, ids, len(self.weight))
        inverse = None
        if self.temperature is not None:
            per_row = self.temperature.expand(len(self.mask))
            checks.positive_temperature(per_row[where])
            dtype = torch.promote_types(self.hidden.dtype, torch.float32)
            inverse = per_row[where].to(dtype).reciprocal()
        return Rows(self.hidden[where], ids, inverse)

    def kept(self, where: Index, values: Tensor | None = None) -> support.Kept | None:
        """Return the kept ids of the selected rows, None without a support."""
        if self.support_cu is None:
            return None
        return support.Kept(self.support_ids, self.support_cu, values)[where]

    def kept_of(self, rows: Rows, where: Index, ids_name: str = "token_ids") -> support.Kept | None:
        """Return the kept ids of rows selected before, and check their values."""
        kept = self.kept(where)
        if kept is not None and checks.looks_at_values(kept.ids):
            checks.kept_ids(kept.ids, len(self.weight))
            inside, row = kept.cu.diff() == 0, kept.row()
            inside[row[kept.ids == rows.ids[row]]] = True
            checks.within_support(ids_name, rows.ids, inside)
        return kept

    def words(self, sparsity: float, draw_seed: Tensor, where: Index) -> sparse.Words:
        """Return the random words that decide which entries of the selected rows are kept."""
        return sparse.Words.of(sparsity, draw_seed, len(self.mask), len(self.weight))[where]

    def trained(self) -> Tensor:
        """Return what a gradient with respect to the weight belongs to."""
        return getattr(self, _name_of_trained(self.lora))

    def dtypes(self) -> tuple[torch.dtype | None, ...]:
        """Return the dtypes of hidden, of the weight that gradients are of, and of bias."""
        tensors = (self.hidden, self.trained(), self.bias)
        return tuple(None if x is None else x.dtype for x in tensors)


def _name_of_trained(lora: Tensor | None) -> str:
    """Return the name of the tensor that a gradient with respect to the weight belongs to."""
    return "weight" if lora is None else "lora"


def parameters(fn: Callable) -> type:
    """Return a named tuple with a field for each parameter of an op, None by default."""
    names = list(inspect.signature(fn).parameters)
    return namedtuple("Parameters", names, defaults=[None] * len(names))


# ---- linear_logps ------------------------------------------------------------------------------

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
    rows, head = given.rows(where), given.head()
    kept = given.kept_of(rows, where)

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
      old_logps):  # fmt: skip
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
        ctx.save_for_backward(results.jacobian)
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
        (jacobian,) = ctx.saved_tensors
        return tuple(_LinearLogps(hidden=(jacobian * dlogps[:, None]).to(ctx.dtype)))
    saved = dict(zip(_TENSORS + _RESULTS, ctx.saved_tensors, strict=True))
    needs, trained = _LinearLogps(*ctx.needs_input_grad), _name_of_trained(saved["lora"])
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
    upstream, needs = Upstream(dlogps, dentropy), Needs(need_hidden, need_weight, need_bias)
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


# ---- grpo_loss ---------------------------------------------------------------------------------

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
    ctx.trained = _name_of_trained(given.lora)
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


# ---- policy_loss -------------------------------------------------------------------------------


@custom_op("fastgrpo::policy_loss", mutates_args=(), tags=WAITS)
@without_autocast
def policy_loss(
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
    call = LossCall(
        cu_seqlens, advantages, old_logps, ref_logps, sampler_logps, groups, entropy_threshold,
        normalizer, seed, config_key,
    )  # fmt: skip
    n, where, owner = len(mask), unmasked(mask), Sequences.of(cu_seqlens, mask)

    def evaluate(kernels: Kernels) -> PolicyLoss:
        objective = call.objective(owner, mask, where, kernels, logps.dtype)
        return objective.evaluate(Logps(logps, logps, entropy)[where])

    result = choice.run(evaluate, backend, logps)
    upstream = (spread(x, where, n) for x in result.upstream)
    return or_empty((result.loss, *upstream, result.metrics), logps)


@policy_loss.register_fake
def _(logps, entropy, mask, cu_seqlens, advantages, old_logps, ref_logps, sampler_logps, groups,
      entropy_threshold, normalizer, seed, config_key, backend):  # fmt: skip
    dentropy = logps.shape[0] if config_from_key(config_key).entropy_coef else 0
    sizes = ((), logps.shape[0], dentropy, (len(METRICS), 2))
    return tuple(logps.new_empty(size) for size in sizes)


_PolicyLoss = parameters(policy_loss._init_fn)


def _policy_loss_setup(ctx, inputs, output) -> None:
    _, dlogps, dentropy, metrics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(dlogps, dentropy, metrics)
    ctx.save_for_backward(dlogps, dentropy)


def _policy_loss_backward(ctx, dloss, *_):
    refuse_double_backward()
    if dloss is None:
        return tuple(_PolicyLoss())
    dlogps, dentropy = ctx.saved_tensors
    entropy = dentropy * dloss if len(dentropy) else None
    return tuple(_PolicyLoss(logps=dlogps * dloss, entropy=entropy))


policy_loss.register_autograd(_policy_loss_backward, setup_context=_policy_loss_setup)


# ---- shared by the ops -------------------------------------------------------------------------


def in_dtypes(grads: Grads, dtypes: Iterable[torch.dtype | None]) -> Iterable[Tensor | None]:
    """Yield the gradients converted to these dtypes."""
    return (None if g is None else g.to(d) for g, d in zip(grads, dtypes, strict=True))


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


def or_empty(results: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Replace None by an empty tensor: an op can return only tensors."""
    return tuple(like.new_empty(0) if x is None else x for x in results)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("fastgrpo ops have no second derivative: create_graph must be False")
