"""The loss of packed rows and its gradients, by the cheapest route that is exact.

one pass     6NVH: gradients while the logits are at hand. Losses separable over rows only
Jacobian     4NVH: frozen head, dhidden = dL/dlogp times a row that is known before the loss is
two phases   8NVH: log-probs, then the loss, then a backward on the rows that have a gradient
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastgrpo.chunked import logps_and_grads, logps_bwd, logps_fwd
from fastgrpo.config import LossConfig, needs_entropy
from fastgrpo.packing import Segments, spread
from fastgrpo.policy import PolicyLoss, PolicyRows, policy_loss, policy_terms
from fastgrpo.tiles import Grads, Head, Logps, Needs, Plan, Rows, Upstream, take

HIDDEN_ONLY = Needs(hidden=True, weight=False, bias=False)


def loss_and_grads(
    impl: ModuleType,
    config: LossConfig,
    rows: Rows,
    policy_rows: PolicyRows,
    segments: Segments,  # of these rows, where the loss needs them
    entropy_threshold: Tensor | None,  # ()
    seed: int | None,
    live: int,  # rows after the first `live` are known to have no gradient
    head: Head,
    plan: Plan,
    needs: Needs,
) -> tuple[Logps, PolicyLoss, Grads]:
    """Return the scores of the rows, their loss and the gradients that are needed."""
    with_entropy = needs_entropy(config)
    separable = config.separable and (policy_rows.sampler or not config.corrects_sequences)

    def loss_of(scored: Logps) -> PolicyLoss:
        return policy_loss(impl, config, scored, policy_rows, segments, entropy_threshold, seed)

    def policy(chunk: slice, scored: Logps) -> Upstream:
        return policy_terms(impl, config, scored, policy_rows[chunk]).upstream

    if any(needs) and separable and plan.one_pass(live, head, needs):
        scored, grads = logps_and_grads(impl, rows[:live], head, plan, with_entropy, policy, needs)
        if live < len(rows.ids):
            rest = logps_fwd(impl, rows[live:], head, plan, with_entropy)
            scored = Logps(*(None if a is None else torch.cat([a, b])
                             for a, b in zip(scored, rest, strict=True)))  # fmt: skip
            first = torch.arange(live, device=rows.ids.device)
            grads = grads._replace(hidden=spread(grads.hidden, first, len(rows.ids)))
        return scored, loss_of(scored), grads

    if needs == HIDDEN_ONLY and not config.entropy_coef:
        scored, jacobian = logps_and_jacobian(impl, rows, head, plan, with_entropy)
        result = loss_of(scored)
        dhidden = jacobian.mul_(result.upstream.dlogps[:, None])
        return scored, result, Grads(dhidden, None, None)

    scored = logps_fwd(impl, rows, head, plan, with_entropy)
    result = loss_of(scored)
    if not any(needs):
        return scored, result, Grads(None, None, None)
    alive = result.upstream.live()
    grads = logps_bwd(impl, rows[alive], head, plan, take(scored, alive),
                      take(result.upstream, alive), needs)  # fmt: skip
    return scored, result, grads._replace(hidden=spread(grads.hidden, alive, len(rows.ids)))


def logps_and_jacobian(
    impl: ModuleType, rows: Rows, head: Head, plan: Plan, with_entropy: bool
) -> tuple[Logps, Tensor]:
    """Return the scores and dlogp/dhidden (n, H): with it a backward is elementwise."""
    ones = torch.ones_like(rows.ids, dtype=plan.accumulator)
    scored, grads = logps_and_grads(
        impl, rows, head, plan, with_entropy, lambda c, _: Upstream(ones[c], None), HIDDEN_ONLY
    )
    return scored, grads.hidden
