"""The unbiased sparse backward: 2NVH for scores and gradients, whatever the loss.

A row's gradient with respect to its logits is g ([v = y] - p_v), leaving out 1/T, the softcap and
an entropy term. The term p_v is estimated. An entry v is kept with probability pi_v, about
min(1, p_v / tau), and counts p_v / pi_v, so that the mean over seeds is the exact gradient. The
target is always kept, and its entry is exact. dhidden is then a sum over a few rows of the weight,
and dweight a sum over a few hidden states. The estimate adds at most tau / (1 - tau) of the
variance that sampling the token has. Proofs: docs/sparse-backward.md; its tau is `sparsity` here.

The entries are drawn while the logits are at hand. This needs an estimate of each row's lse before
the pass. The estimate affects how many entries are kept, but never the mean. Without one, a second
pass over the rows that have a gradient draws the entries: 4NVH.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.head.gradients import Grads
from fastgrpo.head.loops import logits_tiles, logps_bwd, logps_fwd
from fastgrpo.head.plan import Needs, Plan
from fastgrpo.torch_kernels.logit_math import tile_logits
from fastgrpo_kernels import WORD_BITS, Draw, EntryList, Head, Kept, Logps, Rows, RowState, Upstream

MOST_SLOTS = 2048
SUMS = 1e-20, 1e30  # of exp(z - anchor) that give a row's lse
SIGMAS = 8  # a count is further than this from its expectation with probability 1e-13
METRICS = ("kept_entries", "kept_entries_max", "overflow_rows", "variance_bound_max")


class Words(NamedTuple):
    """The random words of a seed: with a row's anchor they decide which entries are kept."""

    sparsity: float
    column_words: Tensor  # (V,) int32
    row_words: Tensor  # (n,) int32

    @classmethod
    def of(cls, sparsity: float, seed: Tensor, rows: int, vocab: int) -> Words:
        return cls(sparsity, random_words(2 * seed, vocab), random_words(2 * seed + 1, rows))

    def __getitem__(self, index: Tensor | slice) -> Words:  # type: ignore[override]
        return self._replace(row_words=self.row_words[index])

    def draw(self, anchor: Tensor) -> Draw:
        return Draw(anchor, self.column_words, self.row_words)


class Entries(NamedTuple):
    """The kept entries of rows, and the anchors with which they were drawn."""

    kept: Kept
    anchor: Tensor  # (n,) log(sparsity) above the estimate of lse

    def __getitem__(self, index: Tensor | slice) -> Entries:  # type: ignore[override]
        return Entries(self.kept[index], self.anchor[index])

    def overflow(self, scored: Logps) -> Tensor:
        """Return the rows (n,) bool whose entries do not fit, or could not be drawn (NaN, inf)."""
        usable = self.anchor.isfinite() & scored.lse.isfinite()
        return (self.kept.count > self.kept.ids.shape[1]) | ~usable


def random_words(seed: Tensor, n: int) -> Tensor:
    """Return n words (n,) int32 of `WORD_BITS` bits, the same for a seed () int64 on any device.

    SplitMix64 (Steele, Lea, Flood 2014): a counter times an odd constant, through a finaliser.
    """
    x = seed * -7046029254386353131 + torch.arange(1, n + 1, device=seed.device)
    x = x * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ _shifted(x, shift)) * factor
    return _shifted(x ^ _shifted(x, 31), 64 - WORD_BITS).to(torch.int32)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; `>>` of an int64 fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def slots(sparsity: float, vocab: int) -> int:
    """Return how many entries a row may keep, including its target.

    With an exact estimate of the lse, a row keeps at most 1/sparsity entries on average, whatever
    its entropy.
    """
    expected = 1.1 / sparsity
    return 1 + min(vocab, math.ceil(expected + SIGMAS * math.sqrt(expected)) + 64, MOST_SLOTS)


def logps_and_entries(
    rows: Rows,
    head: Head,
    plan: Plan,
    with_entropy: bool,
    words: Words,
    estimate: Tensor,  # (n,) log-probs under a nearby policy, nats
) -> tuple[Logps, Entries]:
    """Score rows and keep entries in the same pass: 2NVH."""
    kernels, kept = plan.kernels, _target_only(rows, head, plan, words.sparsity)
    anchor = kept.logits[:, 0] - estimate.nan_to_num(0.0) + math.log(words.sparsity)
    draw = words.draw(anchor)
    if _draws_while_scoring(rows, head, plan):
        scored = kernels.linear_draw_fwd(rows, head, with_entropy, draw, kept)
    elif kernels.tile_draw_sum is not None and not with_entropy:
        scored = _summed_while_drawing(rows, head, plan, draw, kept)
    else:
        state = RowState.start(rows, plan.accumulator)
        for tile, c in logits_tiles(rows, head, plan):
            kernels.tile_stats(tile, state[c], with_entropy)
            kernels.tile_draw(tile, draw[c], kept[c])
        scored = state.finish(with_entropy)
    entries = Entries(kept, anchor)
    _settle_overflow(rows, head, plan, words.sparsity, scored, entries)
    return scored, entries


def _summed_while_drawing(rows: Rows, head: Head, plan: Plan, draw: Draw, kept: Kept) -> Logps:
    """Score rows by the exponentials that decide what is drawn."""
    sums = torch.zeros_like(draw.anchor)
    for tile, c in logits_tiles(rows, head, plan):
        sums[c] += plan.kernels.tile_draw_sum(tile, draw[c], kept[c])
    log_sum = sums.log()
    logps = (kept.logits[:, 0] - draw.anchor) - log_sum
    logps.clamp_(max=0.0).masked_fill_(kept.ids[:, 0] != rows.ids, torch.nan)
    scored = Logps(logps, draw.anchor + log_sum)
    # An estimate that is far off, or none, leaves a sum that fp32 cannot hold.
    far = (~((sums > SUMS[0]) & (sums < SUMS[1]))).nonzero()[:, 0]
    if len(far):
        again = logps_fwd(rows[far], head, plan, False)
        scored.logps[far], scored.lse[far] = again.logps, again.lse
    return scored


def entries_of(rows: Rows, head: Head, plan: Plan, words: Words, scored: Logps) -> Entries:
    """Keep entries of rows whose lse is known: 2NVH more."""
    kernels, kept = plan.kernels, _target_only(rows, head, plan, words.sparsity)
    entries = Entries(kept, scored.lse + math.log(words.sparsity))
    draw = words.draw(entries.anchor)
    if _draws_while_scoring(rows, head, plan):
        kernels.linear_draw_fwd(rows, head, False, draw, kept)
    else:
        for tile, c in logits_tiles(rows, head, plan):
            kernels.tile_draw(tile, draw[c], kept[c])
    _settle_overflow(rows, head, plan, words.sparsity, scored, entries)
    return entries


def entries_bwd(
    rows: Rows,
    head: Head,
    plan: Plan,
    scored: Logps,
    upstream: Upstream,
    entries: Entries,
    needs: Needs,
) -> Grads:
    """Return the gradients from the kept entries; rows that overflow take the dense backward."""
    alive = upstream.alive()
    overflow = alive & entries.overflow(scored)
    dense = overflow.nonzero()[:, 0]
    grads = logps_bwd(rows[dense], head, plan, scored[dense], upstream[dense], needs)
    kernels, kept = plan.kernels, entries.kept
    used = torch.arange(kept.ids.shape[1], device=kept.ids.device) < kept.count[:, None]
    row, slot = (used & (alive & ~overflow)[:, None]).nonzero().unbind(1)
    ids = kept.ids[row, slot].long()
    drawn = EntryList(row, ids, slot == 0, kept.logits[row, slot])
    inclusion = _inclusion(drawn.z, entries.anchor[row])
    coef = kernels.entry_grads(drawn, rows, head, scored, upstream, inclusion)
    dhidden = None
    if needs.hidden:
        dhidden = coef.new_zeros(rows.hidden.shape)
        bounds = _bounds(row, len(rows.ids))
        kernels.bag_sum(dhidden, head.weight, ids, coef, bounds)
        if not head.softcap:
            # The exact gradient with respect to a row's logits sums to 0, its estimate only on
            # average. The estimate's sum would multiply what all rows of the weight have in common.
            # (sum) * (mean row of the weight) has mean 0, and is subtracted.
            excess = coef.new_zeros(len(rows.ids), 1)
            kernels.bag_sum(
                excess, torch.ones_like(coef)[:1, None], torch.zeros_like(ids), coef, bounds
            )
            dhidden.addcmul_(excess, _mean_row(head, plan), value=-1)
        dhidden.index_copy_(0, dense, grads.hidden)
    if needs.weight or needs.bias:
        order = ids.argsort(stable=True)
        row, coef, bounds = row[order], coef[order], _bounds(ids[order], len(head.weight))
        if needs.weight:
            kernels.bag_sum(grads.weight, rows.hidden.to(plan.operand), row, coef, bounds)
        if needs.bias:
            ones = coef.new_ones(len(rows.ids), 1)
            kernels.bag_sum(grads.bias[:, None], ones, row, coef, bounds)
    return grads._replace(hidden=dhidden)


def metrics(entries: Entries, scored: Logps) -> Tensor:
    """Return `METRICS` (len, 2): each with its count, the number of rows that drew entries."""
    excess = (entries.anchor - scored.lse).exp()
    overflow = entries.overflow(scored)
    bound = torch.where(excess < 1, excess / (1 - excess), torch.inf)
    # Rows that overflow have an exact gradient.
    bound = bound.masked_fill(overflow, 0.0)
    count = entries.kept.count.clamp(max=entries.kept.ids.shape[1]).to(excess.dtype)
    n = excess.new_full((), len(excess))
    values = (count.sum(), count.sum(), overflow.sum(), bound.sum()) if not len(excess) else (
        count.mean(), count.amax(), overflow.to(excess.dtype).mean(), bound.amax()
    )  # fmt: skip
    return torch.stack([torch.stack([x.to(excess.dtype), n]) for x in values])


def _inclusion(z: Tensor, anchor: Tensor) -> Tensor:
    """Return the probability with which entries other than the target are kept."""
    levels = 2**WORD_BITS
    # The share of the 2^23 possible uniform numbers, 0 among them, that are below e.
    return ((z - anchor).exp() * levels).ceil().clamp(1, levels) / levels


def _target_only(rows: Rows, head: Head, plan: Plan, sparsity: float) -> Kept:
    """Return empty slots with the target in the first one."""
    n, width = len(rows.ids), slots(sparsity, len(head.weight))
    kept = Kept(
        rows.ids.new_zeros((n, width), dtype=torch.int32),
        rows.ids.new_zeros((n, width), dtype=plan.accumulator),
        rows.ids.new_ones((n,), dtype=torch.int32),
    )
    target = rows.ids[:, None].clamp(0, len(head.weight) - 1).to(torch.int32)
    z = target.new_empty(target.shape, dtype=plan.accumulator)
    plan.kernels.entry_logits(rows, head, target, None, z)
    kept.ids[:, :1], kept.logits[:, :1] = target, z
    return kept


def _settle_overflow(
    rows: Rows, head: Head, plan: Plan, sparsity: float, scored: Logps, entries: Entries
) -> None:
    """Decide which rows overflow, by the expected number of their entries.

    Deciding by the number that a row did keep would be biased: near the limit, a row would be
    estimated when its draw was small and not when it was large. Most rows are far from the limit,
    as their probabilities or the number kept tell. For the others the expectation is computed.
    """
    (_, logits, count), anchor = entries
    most = logits.shape[1]
    # exp(anchor - lse) is the sparsity that the row really has, given the error of its estimate.
    # If it is much larger than asked for, so is the variance: such rows overflow too.
    count.masked_fill_(anchor - scored.lse > 0.5 * math.log(sparsity), most + 1)
    if most > len(head.weight):  # no row has more entries
        return
    limit = most - SIGMAS * math.sqrt(most)
    near = ((scored.lse - anchor).exp() > limit) & (count <= most)
    near &= count > most - 2 * SIGMAS * math.sqrt(most)
    some = near.nonzero()[:, 0]
    if not len(some):
        return
    rows, anchor = rows[some], anchor[some]
    expected = 1 - (logits[some, 0] - anchor).exp().clamp_(max=1)  # the target is always kept
    for tile, c in logits_tiles(rows, head, plan):
        expected[c] += (tile_logits(tile) - anchor[c, None]).exp_().clamp_(max=1).sum(1)
    count[some[expected > limit]] = most + 1


def _draws_while_scoring(rows: Rows, head: Head, plan: Plan) -> bool:
    """Whether a kernel draws in the epilogue of its product, without a tile of logits."""
    able = plan.kernels.linear_draw_fwd is not None and plan.uses_anchored(rows, head)
    return able and len(rows.ids) > 0


def _mean_row(head: Head, plan: Plan) -> Tensor:
    """Return the mean of the weight's rows (1, H)."""
    slices = plan.slices(head, plan.slice_width)
    total = sum(part.weight.sum(0, dtype=plan.accumulator) for part in slices)
    return total[None] / len(head.weight)


def _bounds(sorted_bags: Tensor, bags: int) -> Tensor:
    """Return where each bag begins and ends (bags + 1,) among entries sorted by bag."""
    edges = torch.arange(bags + 1, device=sorted_bags.device)
    return torch.searchsorted(sorted_bags, edges)
