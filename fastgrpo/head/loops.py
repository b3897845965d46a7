"""The loops over logits tiles: everything vocabulary-sized happens here, one tile at a time.

With NVH = tokens * vocabulary * hidden size, one GEMM costs 2NVH. Three loops share the same steps
(logits GEMM -> `tile_stats` -> `tile_grad` -> gradient GEMMs), which the backends implement:

    logps_fwd        2NVH   a tile is a slice of the vocabulary; nothing is kept
    logps_and_grads  6NVH   a tile is a chunk of rows with all its logits, which become gradients as
                            soon as the loss knows dL/dlogp (4NVH when only `hidden` needs one)
    logps_bwd        6NVH   recomputes slices of the vocabulary from the saved lse; each slice of
                            dweight is written once, so that no fp32 copy of it exists

Where a backend has the anchored kernel, the first two take its results instead: scores without
logits, and exponentials of which every gradient is a GEMM and a factor per row.

Rows are packed: callers have dropped masked ones. All per-row tensors are (n,) in the accumulation
dtype (fp32; fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from fastgrpo.head.gradients import GradSums, Targets, add_exps, add_tile, matmul
from fastgrpo.head.plan import (
    Grads,
    Head,
    Logps,
    Needs,
    Plan,
    Rows,
    Upstream,
    chunks,
    padded,
    take,
)
from fastgrpo_kernels import RowState

Policy = Callable[[slice, Logps], Upstream]
"""How the loss of a slice of the rows depends on their log-probs."""

ENOUGH_ALIVE = 0.9  # share of rows with a gradient at which dropping the others does not pay
PACKED_AT_ONCE = 256  # rows that move together


def logps_fwd(impl: ModuleType, rows: Rows, head: Head, plan: Plan, with_entropy: bool) -> Logps:
    """Score rows: 2NVH, O(n) numbers written."""
    if _has_anchored(impl, rows, head):
        return _anchored_scores(impl, rows, head, with_entropy)[0]
    if hasattr(impl, "linear_logps_fwd"):
        scored = impl.linear_logps_fwd(
            rows.hidden, head.weight, rows.ids, head.bias, rows.inv_temperature,
            head.logit_scale, head.softcap, with_entropy,
        )  # fmt: skip
        return Logps(*scored)
    state = new_state(rows, plan)
    in_place = hasattr(impl, "tile_exp") and not (with_entropy or head.softcap)
    for z, v, bias, c in logits_tiles(impl, rows, head, plan):
        if in_place:
            impl.tile_exp(z, rows.ids[c], v.start, bias, rows[c].inv_temperature,
                          head.logit_scale, take(state, c))  # fmt: skip
        else:
            fold(impl, z, v, bias, rows[c], head, take(state, c), with_entropy)
    return finish(state, with_entropy)


def logits_tiles(
    impl: ModuleType, rows: Rows, head: Head, plan: Plan
) -> Iterator[tuple[Tensor, slice, Tensor | None, slice]]:
    """Yield every tile of logits, in one buffer, with its columns, their bias, and its rows."""
    hidden = rows.hidden.to(plan.operand)
    width = min(plan.slice_width, head.weight.shape[0])
    buffer = plan.new_tile(impl, rows[: plan.slice_rows], width)
    for v, weight, bias in plan.slices(head, plan.slice_width):
        for c in chunks(len(rows.ids), plan.slice_rows):
            z = buffer[: c.stop - c.start, : v.stop - v.start]
            matmul(z, hidden[c], weight.t())
            yield z, v, bias, c


def logps_and_grads(
    impl: ModuleType,
    rows: Rows,
    head: Head,
    plan: Plan,
    with_entropy: bool,
    policy: Policy,
    needs: Needs,
    *,
    entropy_gradient: bool = True,
    may_drop_rows: bool = False,
) -> tuple[Logps, Grads]:
    """Score rows and make the gradients of the loss while their logits are at hand: 6NVH.

    `policy` turns the log-probs of a chunk into dL/dlogp, so the loss must be separable over rows.
    Unless `entropy_gradient` it gives none by the entropy. With `may_drop_rows` it may find rows
    without any gradient, which a GPU then looks for, at one wait for it per chunk.
    """
    # Its exponentials leave fp16's range, and their GEMMs need results wider than operands.
    suits = rows.hidden.dtype == torch.bfloat16 and plan.mixed and len(rows.ids) > 0
    if suits and not entropy_gradient and _has_anchored(impl, rows, head):
        return _anchored_logps_and_grads(
            impl, rows, head, plan, with_entropy, policy, needs, may_drop_rows
        )
    n, one_chunk = len(rows.ids), len(rows.ids) <= plan.chunk
    state = new_state(rows, plan)
    sums = GradSums.of(rows, head, plan, needs, whole=not one_chunk)
    buffer = plan.new_tile(impl, rows[: plan.chunk], head.weight.shape[0])
    # What the gradient needs besides exponentials is per row: a backend may leave them in the tile.
    keeps_exp = hasattr(impl, "tile_exp") and not (with_entropy or head.softcap or plan.mixed)
    for c in chunks(n, plan.chunk):
        part, tile = rows[c], buffer[: c.stop - c.start]
        hidden = part.hidden.to(plan.operand)
        anchors = []
        for v, weight, bias in plan.slices(head, plan.chunk_width):
            matmul(tile[:, v], hidden, weight.t())
            if keeps_exp:
                anchors += [impl.tile_exp(tile[:, v], part.ids, v.start, bias, part.inv_temperature,
                                          head.logit_scale, take(state, c))]  # fmt: skip
            else:
                fold(impl, tile[:, v], v, bias, part, head, take(state, c), with_entropy)
        scored = finish(take(state, c), with_entropy)
        upstream = policy(c, scored)
        live = None
        # Dropping the rows without gradient would stall a GPU once per chunk.
        if not rows.hidden.is_cuda and len(found := upstream.live()) < len(part.ids):
            live, part, hidden = found, part[found], hidden[found]
            scored, upstream = take(scored, live), take(upstream, live)
            anchors = [anchor[live] for anchor in anchors]
        targets = Targets.of(part, plan)
        dhidden = sums.rows(c, live)
        for i, (v, weight, bias) in enumerate(plan.slices(head, plan.chunk_width)):
            z = tile[:, v] if live is None else tile[:, v].index_select(0, live)
            if keeps_exp:
                impl.tile_exp_grad(z, part.ids, v.start, part.inv_temperature, head.logit_scale,
                                   anchors[i], scored.lse, upstream.dlogps)  # fmt: skip
                dz = z
            else:
                dz = _tile_grad(impl, z, v, bias, part, head, plan, scored, upstream, targets)
            grads = Grads(dhidden, *sums.slice(v))
            add_tile(impl, grads, dz, v, weight, hidden, targets, accumulate=c.start > 0)
            if one_chunk:
                sums.store(v)
        targets.add_to(dhidden, part, head)
        sums.store_rows(c, live, dhidden)
    return finish(state, with_entropy), sums.result()


def _anchored_logps_and_grads(
    impl: ModuleType,
    rows: Rows,
    head: Head,
    plan: Plan,
    with_entropy: bool,
    policy: Policy,
    needs: Needs,
    may_drop_rows: bool,
) -> tuple[Logps, Grads]:
    """Score rows and make their gradients from exp(z - anchor), which is all that is stored: 6NVH.

    dL/dz0_v is scale * exp(z_v - anchor) for every v but the target, with one scale per row.
    """
    n, vocab = len(rows.ids), head.weight.shape[0]
    size = plan.exps_chunk(n, head, needs)
    sums = GradSums.of(rows, head, plan, needs, whole=n > size)
    buffer = rows.hidden.new_empty((size, padded(vocab)))[:, :vocab]
    results = []
    for c in chunks(n, size):
        part, exps = rows[c], buffer[: c.stop - c.start]
        scored, log_scale = _anchored_scores(impl, part, head, with_entropy, exps)
        results.append(scored)
        upstream, live = policy(c, scored), None
        if may_drop_rows or not rows.hidden.is_cuda:
            found = upstream.live()
            if len(found) < ENOUGH_ALIVE * len(part.ids):
                live, part, log_scale = found, part[found], log_scale[found]
                scored, upstream = take(scored, live), take(upstream, live)
                exps = _packed(exps, live)
        scale = -upstream.dlogps * log_scale.exp() * part.slope(head)
        targets = Targets.of_scores(part, head, scored, upstream)
        dhidden = sums.rows(c, live)
        if dhidden is not None:
            matmul(dhidden, exps, head.weight)
            dhidden.mul_(scale[:, None])
            targets.add_to(dhidden, part, head)
            sums.store_rows(c, live, dhidden)
        if needs.weight or needs.bias:
            scaled = (part.hidden * scale[:, None]).to(plan.operand) if needs.weight else None
            for v in chunks(vocab, plan.chunk_width):
                grads = Grads(None, *sums.slice(v))
                add_exps(impl, grads, exps[:, v], scale, v, part.hidden, scaled, targets,
                         accumulate=c.start > 0)  # fmt: skip
                if n <= size:
                    sums.store(v)
    del buffer, exps  # before another dweight is made of the sums
    scored = (None if x[0] is None else torch.cat(x) for x in zip(*results, strict=True))
    return Logps(*scored), sums.result()


def _has_anchored(impl: ModuleType, rows: Rows, head: Head) -> bool:
    return hasattr(impl, "has_anchored") and impl.has_anchored(rows.hidden, head.weight)


def _anchored_scores(
    impl: ModuleType, rows: Rows, head: Head, with_entropy: bool, exps: Tensor | None = None
) -> tuple[Logps, Tensor]:
    """Return the scores and the logarithm of what makes probabilities of the exponentials."""
    result = impl.anchored_logps_fwd(
        rows.hidden, head.weight, rows.ids, head.bias, rows.inv_temperature, head.logit_scale,
        head.softcap, with_entropy, exps=exps,
    )  # fmt: skip
    return Logps(result.logps, result.lse, result.entropy), result.log_scale


def _packed(tile: Tensor, index: Tensor) -> Tensor:
    """Move the rows of an ascending index to the front of a tile, in place, and return them."""
    for c in chunks(len(index), PACKED_AT_ONCE):
        # Row i comes from index[i] >= i: what is still needed has not been overwritten.
        tile[c] = tile.index_select(0, index[c])
    return tile[: len(index)]


def logps_bwd(
    impl: ModuleType,
    rows: Rows,
    head: Head,
    plan: Plan,
    scored: Logps,
    upstream: Upstream,
    needs: Needs,
) -> Grads:
    """Recompute the logits in slices of the vocabulary and return the gradients: 6NVH."""
    sums = GradSums.of(rows, head, plan, needs, whole=False)
    if not len(rows.ids):
        return sums.result()
    hidden = rows.hidden.to(plan.operand)
    parts = list(chunks(len(rows.ids), plan.slice_rows))
    targets = [Targets.of(rows[c], plan) for c in parts]
    for v, weight, bias in plan.slices(head, plan.slice_width):
        for c, chunk_targets in zip(parts, targets, strict=True):
            z = plan.new_tile(impl, rows[c], v.stop - v.start)
            matmul(z, hidden[c], weight.t())
            dz = _tile_grad(impl, z, v, bias, rows[c], head, plan, take(scored, c),
                            take(upstream, c), chunk_targets)  # fmt: skip
            grads = Grads(sums.rows(c), *sums.slice(v))
            add_tile(impl, grads, dz, v, weight, hidden[c], chunk_targets, c.start > 0)
        sums.store(v)
    for c, chunk_targets in zip(parts, targets, strict=True):
        chunk_targets.add_to(sums.rows(c), rows[c], head)
    return sums.result()


def _tile_grad(
    impl: ModuleType,
    z: Tensor,
    v: slice,
    bias: Tensor | None,
    rows: Rows,
    head: Head,
    plan: Plan,
    scored: Logps,
    upstream: Upstream,
    targets: Targets,
) -> Tensor:
    """Turn a tile of logits into its gradient: in place, or as the GEMMs' 16-bit operand."""
    dz = z if targets.coef is None else torch.empty_like(z, dtype=plan.operand)
    impl.tile_grad(
        z, rows.ids, v.start, bias, rows.inv_temperature, head.logit_scale, head.softcap,
        scored.lse, scored.entropy, upstream.dlogps, upstream.dentropy, dz, targets.coef,
    )  # fmt: skip
    return dz


def fold(
    impl: ModuleType,
    z: Tensor,
    v: slice,
    bias: Tensor | None,
    rows: Rows,
    head: Head,
    state: RowState,
    with_entropy: bool,
) -> None:
    """Fold a tile of logits into the statistics of its rows."""
    impl.tile_stats(
        z, rows.ids, v.start, bias, rows.inv_temperature, head.logit_scale, head.softcap,
        state, with_entropy,
    )  # fmt: skip


def new_state(rows: Rows, plan: Plan) -> RowState:
    """Return the statistics of rows that have seen no logits. A target outside [0, V) stays NaN."""

    def full(value: float) -> Tensor:
        return torch.full_like(rows.ids, value, dtype=plan.accumulator)

    return RowState(max=full(-torch.inf), sum=full(0.0), dot=full(0.0), target=full(torch.nan))


def finish(state: RowState, with_entropy: bool) -> Logps:
    log_sum = state.sum.log()
    # (target - max) first: exact where the target is the maximum, so that logp never exceeds 0.
    logps = (state.target - state.max) - log_sum
    return Logps(
        logps, state.max + log_sum, log_sum - state.dot / state.sum if with_entropy else None
    )
