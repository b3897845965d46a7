"""The loops over logits tiles: everything vocabulary-sized happens here, one tile at a time.

With NVH = tokens * vocabulary * hidden size, one GEMM costs 2NVH. Three loops share the same steps
(logits GEMM -> `tile_stats` -> `tile_grad` -> gradient GEMMs), which the backends implement:

    logps_fwd        2NVH   a tile is a slice of the vocabulary; nothing is kept. On a CPU it is a
                            chunk of rows with all its logits, as in the next loop
    logps_and_grads  6NVH   a tile is a chunk of rows with all its logits, which become gradients as
                            soon as the loss knows dL/dlogp (4NVH when only `hidden` needs one)
    logps_bwd        6NVH   recomputes the logits in slices of the vocabulary, from the saved lse;
                            each slice of dweight is written once: no fp32 copy of it exists

Where a backend has the anchored kernel, the first two use it instead. It gives scores without
logits, and exponentials: every gradient is then a GEMM with a factor per row.

Rows are packed: callers have dropped masked rows. All per-row tensors are (n,) in the accumulation
dtype (fp32; fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from fastgrpo.head.gradients import Grads, GradSums, Scaling, Targets
from fastgrpo.head.held import (
    AnchoredExponentials,
    Held,
    Probabilities,
    RawLogits,
    tile_gradient,
)
from fastgrpo.head.plan import Needs, Plan, chunks
from fastgrpo_kernels import Head, Logps, Rows, RowState, Tile, Upstream


class SeparableLoss(Protocol):
    """The interface of a loss whose gradient at a row depends on no other row."""

    @property
    def with_entropy(self) -> bool:
        """Whether it needs the rows' entropies."""
        ...

    @property
    def entropy_gradient(self) -> bool:
        """Whether it has a gradient with respect to the entropies."""
        ...

    @property
    def may_drop_rows(self) -> bool:
        """Whether rows may turn out to have no gradient at all."""
        ...

    @property
    def magnitude(self) -> Tensor | None:
        """|dL/dlogp| (n,) of each row if its ratio is 1, about; None: about 1."""
        ...

    def upstream(self, chunk: slice, scored: Logps) -> Upstream:
        """Return the gradients with respect to the scores of a chunk of rows."""
        ...


def logps_fwd(rows: Rows, head: Head, plan: Plan, with_entropy: bool) -> Logps:
    """Score rows: 2NVH, O(n) numbers written."""
    kernels = plan.kernels
    if plan.uses_anchored(rows, head):
        return kernels.anchored_logps_fwd(rows, head, with_entropy).scored
    if kernels.linear_logps_fwd is not None and head.lora is None:
        return kernels.linear_logps_fwd(rows, head, with_entropy)
    if Probabilities.suit(head, plan):
        # As a loss with its gradients does: a policy's ratio to itself is 1, to the last bit.
        held = Probabilities(rows, head, plan, with_entropy)
        scores = [held.score(rows[c]) for c in chunks(len(rows.ids), held.size)]
        return Logps.cat(scores) if scores else Logps.empty(rows, plan.accumulator, with_entropy)
    state = RowState.start(rows, plan.accumulator)
    for tile, c in logits_tiles(rows, head, plan):
        kernels.tile_stats(tile, state[c], with_entropy)
    return state.finish(with_entropy)


def logits_tiles(rows: Rows, head: Head, plan: Plan) -> Iterator[tuple[Tile, slice]]:
    """Yield every tile of logits with the slice of its rows; all tiles share one buffer."""
    n, hidden = len(rows.ids), rows.hidden.to(plan.operand)
    width = min(plan.slice_width, len(head.weight))
    buffer = plan.new_tile(min(n, plan.slice_rows), width, rows.hidden.device)
    for v, weight, bias in plan.slices(head, plan.slice_width):
        for c in chunks(n, plan.slice_rows):
            z = buffer[: c.stop - c.start, : v.stop - v.start]
            plan.kernels.matmul(z, hidden[c], weight.t())
            yield Tile(z, v, bias, rows[c], head), c


def logps_and_grads(
    rows: Rows, head: Head, plan: Plan, needs: Needs, loss: SeparableLoss
) -> tuple[Logps, Grads]:
    """Score rows, and compute the gradients of the loss while their logits are at hand: 6NVH."""
    n = len(rows.ids)
    held = _held(rows, head, plan, needs, loss)
    several = n > held.size
    sums = GradSums.of(rows, head, plan, needs, whole=several)
    scaling, scores = Scaling(), []
    if several and plan.fp16_tiles and loss.magnitude is not None:
        scaling = Scaling.expected(rows, head, loss.magnitude[:n])
    for c in chunks(n, held.size):
        scored = held.score(rows[c])
        scores.append(scored)
        upstream, kept = loss.upstream(c, scored), None
        if not several:
            scaling = Scaling.known(rows, head, plan, upstream)
        upstream = scaling.lifted(upstream)
        if not plan.sync_stalls or (loss.may_drop_rows and held.worth_a_wait):
            live = upstream.live()
            if held.worth_dropping(len(scored.logps) - len(live)):
                kept = held.keep(live)
                upstream = upstream[kept]
        dhidden = sums.dhidden_of(c, kept)
        held.add_to(sums, dhidden, upstream, accumulate=c.start > 0)
        sums.store_dhidden(c, kept, dhidden)
    del held  # frees the buffer before `result` may convert dweight
    scored = Logps.cat(scores) if scores else Logps.empty(rows, plan.accumulator, loss.with_entropy)
    return scored, scaling.restored(sums.result())


def _held(rows: Rows, head: Head, plan: Plan, needs: Needs, loss: SeparableLoss) -> Held:
    """Choose how chunks of rows are held; see `fastgrpo.head.held`."""
    if not loss.entropy_gradient and AnchoredExponentials.suit(rows, head, plan):
        return AnchoredExponentials(rows, head, plan, loss.with_entropy, needs)
    suits = not loss.entropy_gradient and Probabilities.suit(head, plan)
    return (Probabilities if suits else RawLogits)(rows, head, plan, loss.with_entropy)


def logps_bwd(
    rows: Rows, head: Head, plan: Plan, scored: Logps, upstream: Upstream, needs: Needs
) -> Grads:
    """Recompute the logits in slices of the vocabulary and return the gradients: 6NVH."""
    sums = GradSums.of(rows, head, plan, needs, whole=False)
    write_gradients(sums, rows, head, plan, scored, upstream)
    return sums.result()


def write_gradients(
    sums: GradSums, rows: Rows, head: Head, plan: Plan, scored: Logps, upstream: Upstream
) -> None:
    """Write the gradients of rows to empty sums: the work of `logps_bwd`."""
    if not len(rows.ids):
        return
    scaling = Scaling.known(rows, head, plan, upstream)
    upstream, hidden = scaling.lifted(upstream), rows.hidden.to(plan.operand)
    parts = list(chunks(len(rows.ids), plan.slice_rows))
    targets = [Targets.of(rows[c], plan) for c in parts]
    for part in plan.slices(head, plan.slice_width):
        v = part.columns
        for c, chunk_targets in zip(parts, targets, strict=True):
            z = plan.new_tile(c.stop - c.start, v.stop - v.start, rows.hidden.device)
            plan.kernels.matmul(z, hidden[c], part.weight.t())
            tile = Tile(z, v, part.bias, rows[c], head)
            dz = tile_gradient(tile, plan, scored[c], upstream[c], chunk_targets)
            sums.add_tile(dz, part, hidden[c], sums.dhidden_of(c), c.start > 0)
            sums.add_targets(v, hidden[c], chunk_targets)
        sums.store(v)
    for c, chunk_targets in zip(parts, targets, strict=True):
        chunk_targets.add_to(sums.dhidden_of(c), rows[c], head)
    scaling.restored(Grads(sums.dhidden, sums.dweight, sums.dbias))
