"""The op of `fastgrpo.policy_loss`: the loss from given log-probs."""

from __future__ import annotations

from torch import Tensor
from torch.library import custom_op

from fastgrpo.backend import Kernels
from fastgrpo.dispatch import choice
from fastgrpo.objective.call import LossCall
from fastgrpo.objective.config import config_from_key
from fastgrpo.objective.metrics import METRICS
from fastgrpo.objective.policy import PolicyLoss
from fastgrpo.objective.segments import Sequences
from fastgrpo.ops.schema import (
    WAITS,
    or_empty,
    parameters,
    refuse_double_backward,
    without_autocast,
)
from fastgrpo.packing import spread, unmasked
from fastgrpo_kernels import Logps


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
