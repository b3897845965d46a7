"""The loss of packed rows and its gradients, by the cheapest route that is exact.

one pass     6NVH: gradients while the logits are at hand; only for losses separable over rows
Jacobian     4NVH: frozen head; dhidden = dL/dlogp * dlogp/dhidden, computed before the loss
two phases   8NVH: log-probs, then the loss, then a backward on the rows that have a gradient
sparse       2NVH: log-probs and a few entries of each row, then the loss, then sums over entries;
             not exact but unbiased, and only if asked for (`fastgrpo.head.sparse`)
support      two phases on the kept ids of each row, where it has some (`fastgrpo.head.support`)
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fastgrpo.head import sparse, support
from fastgrpo.head.gradients import Grads
from fastgrpo.head.loops import SeparableLoss, logps_and_grads, logps_bwd, logps_fwd
from fastgrpo.head.plan import Needs, Plan
from fastgrpo.packing import spread
from fastgrpo_kernels import Head, Logps, Rows, Upstream

HIDDEN_ONLY = Needs(hidden=True, weight=False, bias=False)


class Evaluated(Protocol):
    """A loss whose value and gradients are known."""

    @property
    def upstream(self) -> Upstream: ...


Result = TypeVar("Result", bound=Evaluated, covariant=True)


class Loss(SeparableLoss, Protocol[Result]):
    """The interface of a loss: from the scores of rows to its value and gradients."""

    @property
    def separable(self) -> bool:
        """Whether `upstream` can be computed chunk by chunk."""
        ...

    @property
    def estimate(self) -> Tensor | None:
        """(n,) log-probs under a nearby policy, nats: with them a sparse forward draws."""
        ...

    def evaluate(self, scored: Logps) -> Result:
        """Return the loss of all rows with its gradients."""
        ...


def loss_and_grads(
    loss: Loss[Result],
    rows: Rows,
    head: Head,
    plan: Plan,
    needs: Needs,
    words: sparse.Words | None,  # None: exact
    num_live: int,  # rows after the first `num_live` are known to have no gradient
    kept: support.Kept | None = None,
) -> tuple[Logps, Result, Grads, Tensor | None]:
    """Return the scores of the rows, their loss, the gradients, and the metrics of a draw."""
    if kept is not None:
        return *_over_support(loss, rows, head, plan, needs, kept), None

    if any(needs) and words is not None:
        return _sparse(loss, rows, head, plan, needs, words, num_live)

    if any(needs) and loss.separable:
        scored, grads = logps_and_grads(rows[:num_live], head, plan, needs, loss)
        scored = _and_rest(scored, rows[num_live:], head, plan, loss.with_entropy)
        return scored, loss.evaluate(scored), _before_rest(grads, num_live, len(rows.ids)), None

    if needs == HIDDEN_ONLY and not loss.entropy_gradient:
        scored, jacobian = logps_and_jacobian(rows, head, plan, loss.with_entropy)
        result = loss.evaluate(scored)
        dhidden = jacobian.mul_(result.upstream.dlogps[:, None])
        return scored, result, Grads(dhidden, None, None), None

    scored = logps_fwd(rows, head, plan, loss.with_entropy)
    result = loss.evaluate(scored)
    if not any(needs):
        return scored, result, Grads(None, None, None), None
    live = result.upstream.live()
    grads = logps_bwd(rows[live], head, plan, scored[live], result.upstream[live], needs)
    dhidden = spread(grads.hidden, live, len(rows.ids))
    return scored, result, grads._replace(hidden=dhidden), None


class _SumOfLogps(NamedTuple):
    """The loss whose gradient with respect to every log-prob is 1."""

    with_entropy: bool
    entropy_gradient: bool = False
    may_drop_rows: bool = False
    magnitude: Tensor | None = None

    def upstream(self, chunk: slice, scored: Logps) -> Upstream:
        return Upstream(torch.ones_like(scored.logps))


def logps_and_jacobian(
    rows: Rows, head: Head, plan: Plan, with_entropy: bool
) -> tuple[Logps, Tensor]:
    """Return the scores and dlogp/dhidden (n, H), with which a backward is elementwise."""
    scored, grads = logps_and_grads(rows, head, plan, HIDDEN_ONLY, _SumOfLogps(with_entropy))
    return scored, grads.hidden


def _over_support(
    loss: Loss[Result], rows: Rows, head: Head, plan: Plan, needs: Needs, kept: support.Kept
) -> tuple[Logps, Result, Grads]:
    scored, z = support.logps_fwd(rows, head, plan, kept, loss.with_entropy)
    result = loss.evaluate(scored)
    if not any(needs):
        return scored, result, Grads(None, None, None)
    live = result.upstream.live()
    kept = kept._replace(values=z)[live]
    grads = support.logps_bwd(
        rows[live], head, plan, kept, scored[live], result.upstream[live], needs
    )
    return scored, result, grads._replace(hidden=spread(grads.hidden, live, len(rows.ids)))


def _sparse(
    loss: Loss[Result],
    rows: Rows,
    head: Head,
    plan: Plan,
    needs: Needs,
    words: sparse.Words,
    num_live: int,
) -> tuple[Logps, Result, Grads, Tensor]:
    n = len(rows.ids)
    if loss.estimate is None:
        scored = logps_fwd(rows, head, plan, loss.with_entropy)
        result = loss.evaluate(scored)
        chosen = result.upstream.live()
        rows, drawn = rows[chosen], scored[chosen]
        entries = sparse.entries_of(rows, head, plan, words[chosen], drawn)
    else:
        chosen = slice(0, num_live)
        drawn, entries = sparse.logps_and_entries(
            rows[chosen], head, plan, loss.with_entropy, words[chosen], loss.estimate[chosen]
        )
        scored = _and_rest(drawn, rows[num_live:], head, plan, loss.with_entropy)
        result = loss.evaluate(scored)
        rows = rows[chosen]
    upstream = result.upstream[chosen]
    grads = sparse.entries_bwd(rows, head, plan, drawn, upstream, entries, needs)
    metrics = sparse.metrics(entries, drawn)
    if loss.estimate is None:
        grads = grads._replace(hidden=spread(grads.hidden, chosen, n))
    else:
        grads = _before_rest(grads, num_live, n)
    return scored, result, grads, metrics


def _and_rest(scored: Logps, rest: Rows, head: Head, plan: Plan, with_entropy: bool) -> Logps:
    """Append the scores of the remaining rows, which have no gradient."""
    if not len(rest.ids):
        return scored
    return Logps.cat([scored, logps_fwd(rest, head, plan, with_entropy)])


def _before_rest(grads: Grads, num_live: int, n: int) -> Grads:
    """Append zeros to the gradient of hidden for the remaining rows, which have no gradient."""
    if num_live == n or grads.hidden is None:
        return grads
    first = torch.arange(num_live, device=grads.hidden.device)
    return grads._replace(hidden=spread(grads.hidden, first, n))
