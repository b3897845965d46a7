"""Kernels against the torch backend in float64, on the device that they are to run on.

300 rows, a vocabulary of 5003, 256 hidden: no size is a multiple of every block. Hidden states are
a misaligned view where log-probs are compared, and one id there lies outside the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import torch_kernels
from fastgrpo.backend import Kernels
from fastgrpo.head import sparse, support
from fastgrpo.head.gradients import Grads
from fastgrpo.head.loops import logps_and_grads, logps_bwd, logps_fwd
from fastgrpo.head.plan import Needs, Plan
from fastgrpo_kernels import Head, Logps, Rows, TokenObjective, Tokens, Upstream
from fastgrpo_kernels.runtime import dot_precision

MODES = ("dense", "sparse", "support")
ROWS, VOCAB, HIDDEN = 300, 5003, 256
SPARSITY = 0.01
KEPT = (0, 1, 2, 40, 400)  # ids of a support's rows, in turn; 0: the whole vocabulary
# Wide beside what a right kernel reaches, 2e-5 nats in the tests of a GPU, and narrow beside what a
# wrong one gives: a false alarm would cost all kernels.
SCORE_BAR = 1e-4  # nats
GRADIENT_BARS = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}  # relative L2
ROW_FACTOR = 8  # of a gradient's worst row to that of the whole
# TF32 keeps 10 bits of each operand.
TF32_BARS = 2e-2, 1e-2
# An entry whose exponential and random number agree in all digits may be kept by one side only.
SPARSE_BAR = 3e-2
PER_TOKEN_BAR = 1e-5
WEIGHT_AND_HIDDEN = Needs(hidden=True, weight=True, bias=False)


class Figure(NamedTuple):
    """A measured error, and what is allowed."""

    name: str
    error: float
    bar: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bar

    def __str__(self) -> str:
        return f"{self.name} off by {self.error:.1e} (allowed: {self.bar:.0e})"


def complaint(off: list[Figure]) -> str:
    """Return a sentence about figures that do not hold; "" if there are none."""
    return f"wrong numbers: {', '.join(map(str, off))}" if off else ""


class _Given(NamedTuple):
    """A loss whose gradient is given; `SeparableLoss`."""

    dlogps: Tensor
    with_entropy: bool = False
    entropy_gradient: bool = False
    may_drop_rows: bool = False
    magnitude: Tensor | None = None

    def upstream(self, chunk: slice, scored: Logps) -> Upstream:
        return Upstream(self.dlogps[chunk])


@torch.no_grad()
def figures(
    kernels: Kernels,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    modes: tuple[str, ...],
    vocab: int | None = None,
) -> Iterator[Figure]:
    """Yield the errors of a backend's kernels, one after the other.

    `dtypes` are those of hidden and weight; empty: only what works on a number per token. `modes`:
    the sparse backward and the softmax over a support, if they are among them, too. `vocab`: VOCAB
    by default. No random state of torch is touched.
    """
    with torch.autocast(device.type, enabled=False), _any_algorithm():
        yield from _per_token(kernels, device)
        if dtypes:
            problem = _Problem.of(kernels, device, dtypes, vocab or VOCAB)
            yield from _scores(problem)
            yield from _gradients(problem)
            if "sparse" in modes:
                yield from _sparse(problem)
            if "support" in modes:
                yield from _support(problem)


@contextlib.contextmanager
def _any_algorithm() -> Iterator[None]:
    """Allow algorithms that are not deterministic: some of the torch backend's are not."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class _Problem(NamedTuple):
    """The operands of a head and their exact values, with a plan for each."""

    rows: Rows
    head: Head
    plan: Plan
    exact_rows: Rows
    exact_head: Head
    exact_plan: Plan

    @classmethod
    def of(
        cls, kernels: Kernels, device: torch.device, dtypes: tuple[torch.dtype, ...], vocab: int
    ) -> _Problem:
        numbers = _Numbers(device)
        hidden = numbers.normal(ROWS, HIDDEN).to(dtypes[0])
        weight = (numbers.normal(vocab, HIDDEN) * 3 / HIDDEN**0.5).to(dtypes[1])
        ids = numbers.integers(vocab, ROWS)
        ids[:2] = torch.tensor([0, vocab - 1])
        exact = hidden.double(), weight.double()
        return cls(
            Rows(hidden, ids),
            Head(weight),
            Plan.of(hidden, weight, None, kernels),
            Rows(exact[0], ids),
            Head(exact[1]),
            Plan.of(*exact, None, torch_kernels),
        )

    def bars(self) -> tuple[float, float]:
        """Return what is allowed: for scores in nats, for gradients relative."""
        dtypes = (self.rows.hidden.dtype, self.head.weight.dtype)
        if torch.float32 in dtypes and dot_precision(32) == "tf32":
            return TF32_BARS
        return SCORE_BAR, GRADIENT_BARS[dtypes[0]]


class _Numbers:
    """Random tensors from a generator of their own: the same on every device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator("cpu").manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return x.to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device="cpu").to(self.device)


def _scores(problem: _Problem) -> Iterator[Figure]:
    rows, head, plan, exact_rows, exact_head, exact_plan = problem
    view = rows.hidden.new_empty(ROWS, HIDDEN + 3)[:, 3:].copy_(rows.hidden)
    ids = rows.ids.clone()
    ids[7] = len(head.weight)
    scored = logps_fwd(rows._replace(hidden=view, ids=ids), head, plan, True)
    exact = logps_fwd(exact_rows._replace(ids=ids), exact_head, exact_plan, True)
    bar, _ = problem.bars()
    for name in ("logps", "lse", "entropy"):
        yield Figure(name, _largest(getattr(scored, name), getattr(exact, name)), bar)


def _gradients(problem: _Problem) -> Iterator[Figure]:
    rows, head, plan, exact_rows, exact_head, exact_plan = problem
    numbers, needs = _Numbers(rows.hidden.device), WEIGHT_AND_HIDDEN
    dlogps, dentropy = numbers.normal(ROWS), numbers.normal(ROWS)
    exact = logps_fwd(exact_rows, exact_head, exact_plan, True)
    _, bar = problem.bars()

    def compared(way: str, grads: Grads, *upstream: Tensor) -> Iterator[Figure]:
        given = Upstream(*(x.double() for x in upstream))
        wanted = logps_bwd(exact_rows, exact_head, exact_plan, exact, given, needs)
        yield from _relative(way, grads, wanted, bar)

    _, grads = logps_and_grads(rows, head, plan, needs, _Given(dlogps))
    yield from compared("in the forward", grads, dlogps)
    scored = logps_fwd(rows, head, plan, True)
    grads = logps_bwd(rows, head, plan, scored, Upstream(dlogps, dentropy), needs)
    yield from compared("in the backward", grads, dlogps, dentropy)


def _sparse(problem: _Problem) -> Iterator[Figure]:
    rows, head, plan, exact_rows, exact_head, exact_plan = problem
    device = rows.hidden.device
    words = sparse.Words.of(SPARSITY, torch.tensor(0, device=device), ROWS, len(head.weight))
    estimate = logps_fwd(exact_rows, exact_head, exact_plan, False).logps
    dlogps = _Numbers(device).normal(ROWS)

    def estimated(rows: Rows, head: Head, plan: Plan) -> Grads:
        known = estimate.to(plan.accumulator)
        scored, entries = sparse.logps_and_entries(rows, head, plan, False, words, known)
        upstream = Upstream(dlogps.to(plan.accumulator))
        return sparse.entries_bwd(rows, head, plan, scored, upstream, entries, WEIGHT_AND_HIDDEN)

    actual = estimated(rows, head, plan)
    wanted = estimated(exact_rows, exact_head, exact_plan)
    yield from _relative("sparse", actual, wanted, SPARSE_BAR)


def _support(problem: _Problem) -> Iterator[Figure]:
    rows, head, plan, exact_rows, exact_head, exact_plan = problem
    vocab, device = len(head.weight), rows.ids.device
    counts = torch.tensor(KEPT, device=device).repeat(ROWS)[:ROWS]
    cu = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    row = torch.repeat_interleave(counts)
    # The target and what follows it in steps of 7, so that ids of a row differ, its target last.
    rank = cu[1:][row] - 1 - torch.arange(len(row), device=device)
    kept = support.Kept((rows.ids[row] + 7 * rank) % vocab, cu)
    numbers = _Numbers(device)
    upstream = Upstream(numbers.normal(ROWS), numbers.normal(ROWS))

    def scored(rows: Rows, head: Head, plan: Plan) -> tuple[Logps, Grads]:
        scores, z = support.logps_fwd(rows, head, plan, kept, True)
        given = Upstream(*(x.to(plan.accumulator) for x in upstream))
        entries = kept._replace(values=z)
        grads = support.logps_bwd(rows, head, plan, entries, scores, given, WEIGHT_AND_HIDDEN)
        return scores, grads

    actual, grads = scored(rows, head, plan)
    exact, wanted = scored(exact_rows, exact_head, exact_plan)
    score_bar, bar = problem.bars()
    for name in ("logps", "lse", "entropy"):
        error = _largest(getattr(actual, name), getattr(exact, name))
        yield Figure(f"support {name}", error, score_bar)
    yield from _relative("support", grads, wanted, bar)


def _per_token(kernels: Kernels, device: torch.device) -> Iterator[Figure]:
    numbers = _Numbers(device)
    tokens = Tokens(*numbers.normal(4, 1000), ref_logps=numbers.normal(1000))
    loss = TokenObjective("ppo_clip", (0.2, 0.2, 3.0), beta=0.1)
    sequences = torch.tensor([0, 0, 1, 300, 300, 1000], device=device)
    rewards, groups = tokens.advantages[:24], torch.tensor([0, 1, 9, 24], device=device)
    for name, call in {
        "token_loss": lambda k: torch.stack(k.token_loss(tokens, loss)[:2]),
        "segment_reduce": lambda k: k.segment_reduce(tokens.logps, sequences, "sum"),
        "group_stats": lambda k: torch.stack(k.group_stats(rewards, groups)),
    }.items():
        # The kernels first: their memory must not be that of a right answer just freed.
        actual, wanted = call(kernels), call(torch_kernels)
        error = _largest(actual, wanted) / wanted.abs().max().item()
        yield Figure(name, error, PER_TOKEN_BAR)


def _relative(way: str, grads: Grads, wanted: Grads, bar: float) -> Iterator[Figure]:
    for name in ("hidden", "weight"):
        actual, exact = getattr(grads, name).double(), getattr(wanted, name)
        off, size = (x.norm(dim=1) for x in (actual - exact, exact))
        yield Figure(f"d{name} {way}", (off.norm() / size.norm()).item(), bar)
        if way != "sparse":  # there a single entry may be most of a row
            # A few rows that are wrong, a ragged tail, would not show in the whole.
            worst = (off / (size + 0.1 * size.mean())).max().item()
            yield Figure(f"row of d{name} {way}", worst, ROW_FACTOR * bar)


def _largest(actual: Tensor, wanted: Tensor) -> float:
    """Return the largest distance; inf if the two are not NaN in the same places."""
    if not torch.equal(actual.isnan(), wanted.isnan()):
        return float("inf")
    return (actual.double() - wanted).nan_to_num(0.0, torch.inf, torch.inf).abs().max().item()
