"""The loss of packed rows and its gradients, by the cheapest route that is exact.

one pass     6NVH: gradients while the logits are at hand. Losses separable over rows only
Jacobian     4NVH: frozen head, dhidden = dL/dlogp times a row that is known before the loss is
two phases   8NVH: log-probs, then the loss, then a backward on the rows that have a gradient
sparse       2NVH: log-probs and a few entries of each row, then the loss, then sums over entries;
             not exact but unbiased, and only where it is asked for (`fastgrpo.head.sparse`)
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from fastgrpo.head import sparse
from fastgrpo.head.loops import logps_and_grads, logps_bwd, logps_fwd
from fastgrpo.head.plan import Grads, Head, Logps, Needs, Plan, Rows, Upstream, take
from fastgrpo.objective.config import LossConfig, needs_entropy
from fastgrpo.objective.policy import PolicyLoss, PolicyRows, nearest, policy_loss, policy_terms
from fastgrpo.objective.segments import Segments
from fastgrpo.packing import spread

HIDDEN_ONLY = Needs(hidden=True, weight=False, bias=False)


def loss_and_grads(
    impl: ModuleType,
    config: LossConfig,
    rows: Rows,
    policy_rows: PolicyRows,
    segments: Segments,  # of these rows, where the loss needs them
    entropy_threshold: Tensor | None,  # ()
    seed: int | None,
    draw: sparse.Draw | None,  # None: exact
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

    if any(needs) and draw is not None:
        known = (policy_rows.old_logps, policy_rows.sampler_logps, policy_rows.ref_logps)
        return _sparse_loss_and_grads(impl, rows, nearest(*known), draw, live, head, plan,
                                      with_entropy, loss_of, needs)  # fmt: skip

    if any(needs) and separable and plan.one_pass(live, head, needs):
        # A clipped token has no gradient; a KL term or an entropy bonus would give it one.
        clips = policy_rows.old_logps is not None and not (config.beta or config.entropy_coef)
        scored, grads = logps_and_grads(
            impl, rows[:live], head, plan, with_entropy, policy, needs,
            entropy_gradient=config.entropy_coef != 0, may_drop_rows=clips,
        )  # fmt: skip
        scored = _and_rest(impl, scored, rows[live:], head, plan, with_entropy)
        return scored, loss_of(scored), _before_rest(grads, live, len(rows.ids))

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
        impl, rows, head, plan, with_entropy, lambda c, _: Upstream(ones[c], None), HIDDEN_ONLY,
        entropy_gradient=False,
    )  # fmt: skip
    return scored, grads.hidden


def _sparse_loss_and_grads(
    impl: ModuleType,
    rows: Rows,
    estimate: Tensor | None,  # (n,) log-probs of about the same policy
    draw: sparse.Draw,
    live: int,
    head: Head,
    plan: Plan,
    with_entropy: bool,
    loss_of: Callable[[Logps], PolicyLoss],
    needs: Needs,
) -> tuple[Logps, PolicyLoss, Grads]:
    if estimate is None:
        scored = logps_fwd(impl, rows, head, plan, with_entropy)
        result = loss_of(scored)
        chosen = result.upstream.live()
        rows, drawn = rows[chosen], take(scored, chosen)
        entries = sparse.entries_of(impl, rows, head, plan, draw[chosen], drawn)
    else:
        chosen = slice(0, live)
        drawn, entries = sparse.logps_and_entries(
            impl, rows[chosen], head, plan, with_entropy, draw[chosen], estimate[chosen]
        )
        scored = _and_rest(impl, drawn, rows[live:], head, plan, with_entropy)
        result = loss_of(scored)
        rows = rows[chosen]
    upstream = take(result.upstream, chosen)
    grads = sparse.entries_bwd(impl, rows, head, plan, drawn, upstream, entries, needs)
    metrics = torch.cat([result.metrics, sparse.metrics(entries, drawn)])
    n = len(scored.logps)
    if estimate is None:
        grads = grads._replace(hidden=spread(grads.hidden, chosen, n))
    else:
        grads = _before_rest(grads, live, n)
    return scored, result._replace(metrics=metrics), grads


def _and_rest(
    impl: ModuleType, scored: Logps, rest: Rows, head: Head, plan: Plan, with_entropy: bool
) -> Logps:
    """Return the scores of rows with a gradient, and of the rest, which have none, behind them."""
    if not len(rest.ids):
        return scored
    more = logps_fwd(impl, rest, head, plan, with_entropy)
    return Logps(*(None if a is None else torch.cat([a, b])
                   for a, b in zip(scored, more, strict=True)))  # fmt: skip


def _before_rest(grads: Grads, live: int, n: int) -> Grads:
    """Fill the gradient of hidden up with the rows that have none."""
    if live == n:
        return grads
    first = torch.arange(live, device=grads.hidden.device) if grads.hidden is not None else None
    return grads._replace(hidden=spread(grads.hidden, first, n))
