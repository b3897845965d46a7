"""Log-probs of K chosen ids of each row under the full softmax.

    logp_k    logp_y + (z_k - z_y), y being the likeliest of the row's chosen ids
    lse, entropy, sum p^2    from the tiles of logits that logp_y comes from
    dz_v      sum_k g_k [v = k] - (sum_k g_k - dL/dlse) p_v, and an entropy term

So the backward is the dense one of y with dL/dlogp_y = G = sum_k g_k - dL/dlse, and one entry for
each chosen id: g_k, and g_y - G for y itself. Where y has nearly all the probability, its 1 - p_y
is as exact as that of a sampled token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.head.gradients import Grads, GradSums
from fastgrpo.head.loops import logits_tiles, write_gradients
from fastgrpo.head.plan import Needs, Plan
from fastgrpo.head.support import Kept, add_by_id, add_gathered
from fastgrpo.torch_kernels.logit_math import entry_slope
from fastgrpo_kernels import Head, Logps, Rows, RowState, Upstream


class SelectedScores(NamedTuple):
    """The scores of rows, in nats but for the last."""

    logps: Tensor  # (n, K), 0 where nothing is chosen
    lse: Tensor  # (n,)
    entropy: Tensor  # (n,)
    sum_squares: Tensor  # (n,)


class SelectedUpstream(NamedTuple):
    """The gradients of the loss with respect to the scores."""

    dlogps: Tensor  # (n, K), 0 where nothing is chosen
    dlse: Tensor  # (n,)
    dentropy: Tensor | None  # (n,)


def logps_fwd(
    rows: Rows,  # with ids (n, K)
    head: Head,
    plan: Plan,
    chosen: Tensor,  # (n, K) bool: the others have log-prob 0
) -> SelectedScores:
    """Score rows: 2NVH and n K dot products."""
    vocab = len(head.weight)
    ids = rows.ids.clamp(0, vocab - 1)
    z = torch.empty_like(ids, dtype=plan.accumulator)
    plan.kernels.entry_logits(rows, head, ids.to(torch.int32), None, z)
    foreign = ids != rows.ids
    z = z.masked_fill(foreign, -torch.inf)
    top = z.masked_fill(~chosen, -torch.inf).argmax(1, keepdim=True)
    rows = rows._replace(ids=ids.gather(1, top)[:, 0])

    state, of_squares = (RowState.start(rows, plan.accumulator) for _ in range(2))
    inverse = rows.inv_temperature
    # p^2 is proportional to the exponential at half the temperature.
    halved = rows._replace(
        inv_temperature=torch.full_like(state.sum, 2.0) if inverse is None else 2 * inverse
    )
    for tile, c in logits_tiles(rows, head, plan):
        plan.kernels.tile_stats(tile, state[c], True)
        plan.kernels.tile_stats(tile._replace(rows=halved[c]), of_squares[c], False)
    scored = state.finish(True)

    best = z.gather(1, top)
    # Equal ones differ by 0, -inf from -inf too.
    below = torch.where(z == best, 0.0, z - best)
    logps = (scored.logps[:, None] + below).masked_fill(foreign, torch.nan)
    sum_squares = of_squares.sum / state.sum.square()
    return SelectedScores(logps.masked_fill(~chosen, 0.0), scored.lse, scored.entropy, sum_squares)


def logps_bwd(
    rows: Rows,  # with ids (n, K)
    head: Head,
    plan: Plan,
    chosen: Tensor,  # (n, K) bool
    scored: SelectedScores,
    upstream: SelectedUpstream,
    needs: Needs,
) -> Grads:
    """Return the gradients: 6NVH, and two rows of H numbers for each entry."""
    dlogps, dlse, dentropy = upstream
    n, k = rows.ids.shape
    ids = rows.ids.clamp(0, len(head.weight) - 1)
    foreign = ids != rows.ids
    top = scored.logps.masked_fill(foreign | ~chosen, -torch.inf).argmax(1, keepdim=True)
    of_top, others = dlogps.gather(1, top)[:, 0], dlogps.scatter(1, top, 0.0).sum(1) - dlse
    # NaN at a foreign id must not reach the gradients of a caller who leaves that log-prob out.
    z = scored.logps.masked_fill(foreign, 0.0) + scored.lse[:, None]
    inverse = None if rows.inv_temperature is None else rows.inv_temperature[:, None]
    dz0 = dlogps.scatter(1, top, -others[:, None]) * entry_slope(z, inverse, head)
    kept = Kept(ids.flatten(), torch.arange(n + 1, device=ids.device) * k, dz0.flatten())

    rows = rows._replace(ids=ids.gather(1, top)[:, 0])
    top_scores = Logps(scored.logps.gather(1, top)[:, 0], scored.lse, scored.entropy)
    sums = GradSums.of(rows, head, plan, needs, whole=True)
    write_gradients(sums, rows, head, plan, top_scores, Upstream(of_top + others, dentropy))
    part = add_gathered(sums, rows, head, plan, kept)
    if needs.hidden:
        sums.dhidden.add_(part)
    if needs.bias:
        add_by_id(sums.dbias[:, None], dz0.new_ones((n, 1)), kept, plan)
    return sums.result()
