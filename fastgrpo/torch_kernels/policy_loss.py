"""Per-token policy loss with its derivatives and metrics, and reductions over packed segments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo_kernels import TokenObjective, Tokens, TokenTerms
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS, KL_GRADIENTS, k3
from fastgrpo_kernels.policy_loss import token_terms
from fastgrpo_kernels.surrogates import SURROGATES
from fastgrpo_kernels.twins import bounded_exp, torch_twin


def token_loss(tokens: Tokens, loss: TokenObjective, separate: bool = False) -> TokenTerms:
    """Return the weighted loss of each token with its derivatives."""
    logps, log_ratio, advantages, weights, multipliers, context, ref_logps = tokens
    surrogate = SURROGATES[loss.surrogate]
    zero = torch.zeros_like(logps)
    x = zero if ref_logps is None else ref_logps - logps
    losses, dlogps, dratio, clipped = torch_twin(token_terms)(
        logps,
        log_ratio,
        advantages,
        zero if context is None else context,
        loss.parameters,
        1.0 if multipliers is None else multipliers,
        x,
        loss.beta,
        loss.kl_input_clamp,
        loss.kl_output_clamp,
        torch_twin(surrogate.fn),
        torch_twin(KL_ESTIMATORS[loss.kl].fn),
        torch_twin(KL_GRADIENTS[loss.kl_gradient].fn),
        surrogate.slope == "ratio",
        loss.beta != 0,
    )
    losses, dlogps, dratio = losses * weights, dlogps * weights, dratio * weights
    if not separate:
        dlogps, dratio = dlogps + dratio, None
    ratio = torch_twin(bounded_exp)(log_ratio)
    sums = (torch_twin(k3)(x)[0], ratio, clipped < 0, clipped > 0)
    extrema = (ratio.amin(), ratio.amax()) if len(ratio) else (zero.sum(), zero.sum())
    stats = torch.stack([*(s.sum(dtype=torch.float64) for s in sums), *map(Tensor.double, extrema)])
    return TokenTerms(losses, dlogps, dratio, stats)


def segment_reduce(x: Tensor, cu_seqlens: Tensor, op: str) -> Tensor:
    """Return the sum or max of each segment of x (n,), broadcast to the segment's rows."""
    lengths = cu_seqlens.diff()
    segment = torch.repeat_interleave(lengths, output_size=x.shape[0])
    if op == "max":
        start = x.new_full((lengths.shape[0],), -torch.inf)
        return start.scatter_reduce_(0, segment, x, "amax")[segment]
    return x.new_zeros(lengths.shape[0]).index_add_(0, segment, x)[segment]
