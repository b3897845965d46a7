"""Every launcher with what makes Triton specialise: 1, multiples of 16, views, None, nothing.

A case is a name and a function that launches. Values do not matter, because nothing computes.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from unittest import mock

import torch

from fastgrpo_kernels import (
    Draw,
    EntryList,
    Head,
    Kept,
    Logps,
    Marks,
    Rows,
    RowState,
    Tile,
    TokenObjective,
    Tokens,
    Upstream,
    anchored_logps_fwd,
    anchored_variant,
    bag_sum,
    entry_dots,
    entry_grads,
    entry_logits,
    group_stats,
    has_anchored,
    linear_draw_fwd,
    linear_logps_fwd,
    mask_words,
    scatter_rows,
    segment_reduce,
    segment_softmax,
    sum_by_id,
    tile_draw,
    tile_grad,
    tile_stats,
    token_loss,
    warp_trial,
)
from fastgrpo_kernels.runtime import ANCHORED_SMALL_H, LAUNCHES
from fastgrpo_kernels.surrogates import SURROGATES

Case = tuple[str, Callable[[], None]]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOST = torch.device("cpu")
MANY = 70_000


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def view(rows: int, columns: int, dtype: torch.dtype, cut: int) -> torch.Tensor:
    """Rows without their first `cut` numbers: an address and a stride that are odd if `cut` is."""
    return torch.zeros(rows, columns + cut, dtype=dtype)[:, cut:]


def operands(n, vocab, hidden_size, dtype=BF16, *, weight=None, options=False, cut=0):
    """Rows and a head with every option, or with none."""
    rows = Rows(view(n, hidden_size, dtype, cut), integers(n, dtype=torch.int64))
    head = Head(view(vocab, hidden_size, weight or dtype, cut))
    if options:
        rows = rows._replace(inv_temperature=torch.ones(n))
        head = head._replace(bias=torch.zeros(vocab, dtype=head.weight.dtype))
        head = head._replace(logit_scale=0.5, softcap=30.0)
    return rows, head


def slots(n: int, k: int) -> Kept:
    return Kept(integers(n, k), torch.zeros(n, k), integers(n))


def draw_of(n: int, vocab: int) -> Draw:
    return Draw(torch.zeros(n), integers(vocab), integers(n))


def each(launcher: str, run: Callable, shapes: Iterable[dict]) -> Iterator[Case]:
    """A case for each set of keyword arguments of `run`."""
    for shape in shapes:
        words = (f"{name}={str(value).removeprefix('torch.')}" for name, value in shape.items())
        yield " ".join([launcher, *words]), partial(run, **shape)


def both(shapes: Iterable[dict]) -> list[dict]:
    """The shapes without options and with them."""
    return [shape | {"options": options} for shape in shapes for options in (False, True)]


def linear() -> Iterator[Case]:
    shapes = [
        dict(n=5, V=5003, H=200, dtype=BF16),
        dict(n=128, V=4096, H=256, dtype=BF16),
        dict(n=7, V=33, H=64, dtype=FP16, cut=3),
        dict(n=7, V=33, H=64, dtype=FP32),
        dict(n=7, V=33, H=40, dtype=FP32, cut=1),
        dict(n=7, V=33, H=64, dtype=BF16, weight=FP32),
        dict(n=3, V=16, H=1, dtype=BF16),
        dict(n=1, V=1, H=64, dtype=BF16),
        dict(n=1, V=1, H=1, dtype=FP32),
        dict(n=0, V=16, H=16, dtype=BF16),
    ]
    yield from each("linear_logps", run_linear, both(shapes))
    yield "linear_logps tf32", run_tf32
    yield "linear_logps transposed", run_transposed


def run_linear(n, V, H, options, **kinds):
    linear_logps_fwd(*operands(n, V, H, options=options, **kinds), with_entropy=options)


def run_tf32():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    run_linear(7, 33, 64, False, dtype=FP32)
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def run_transposed():
    rows, head = operands(16, 32, 64)
    rows, head = rows._replace(hidden=torch.zeros(64, 16).T), Head(torch.zeros(64, 32).T)
    linear_logps_fwd(rows, head, False)


def anchored(arch: str) -> Iterator[Case]:
    """Where the part has the kernel: every mode of one shape, some modes of others."""
    runs = modes(arch)
    scores = [run for run in runs if run in (run_scores, run_specialised)]
    yield from in_modes(runs, both([dict(n=300, V=5003, H=72, dtype=BF16)]))
    # The scores alone and the marks alone are part of these.
    longest = [run for run in runs if run not in (run_scores, run_marks)]
    yield from in_modes(longest, [dict(n=1, V=1, H=8, dtype=BF16, options=True)])
    yield from in_modes(scores, [dict(n=9, V=600, H=64, dtype=BF16, cut=8, options=False)])
    yield from in_modes(scores, [dict(n=0, V=16, H=16, dtype=BF16, options=True)])
    if runs:
        large = dict(n=16, V=4096, H=ANCHORED_SMALL_H + 8, dtype=FP16, options=True)
        yield from in_modes([run_exps, run_marks], [large])
        yield "anchored moved hidden", run_moved_hidden
    if run_specialised in runs:
        launch = LAUNCHES["anchored_logps_small_h"][16, arch]
        for variant in warp_trial.VARIANTS:
            yield f"anchored trial, {variant}", partial(run_trial, launch, variant)


def anchored_thoroughly(arch: str) -> Iterator[Case]:
    """Every mode of every shape."""
    shapes = [
        dict(n=300, V=5003, H=72, dtype=BF16),
        dict(n=1, V=256, H=8, dtype=FP16),
        dict(n=1, V=1, H=8, dtype=BF16),
        dict(n=9, V=600, H=64, dtype=BF16, cut=8),
        dict(n=300, V=4096, H=ANCHORED_SMALL_H, dtype=BF16),
    ]
    yield from in_modes(modes(arch), both(shapes))


def modes(arch: str) -> list[Callable]:
    if (16, arch) not in LAUNCHES["anchored_logps"]:
        return []
    specialised = (16, arch) in LAUNCHES["anchored_logps_small_h"]
    return [run_scores, run_exps, run_marks, run_draw, *[run_specialised] * specialised]


def in_modes(runs: list[Callable], shapes: list[dict]) -> Iterator[Case]:
    for run in runs:
        yield from each(f"anchored {run.__name__[4:]}", run, shapes)


def anchored_operands(n, V, H, options, **kinds):
    rows, head = operands(n, V, H, options=options, **kinds)
    assert has_anchored(rows, head)
    return rows, head


def run_scores(n, V, H, options, **kinds):
    anchored_logps_fwd(*anchored_operands(n, V, H, options, **kinds), options)


def run_specialised(n, V, H, options, **kinds):
    anchored_variant._REFUSED[HOST] = ""
    with mock.patch.dict(os.environ, {anchored_variant.SWITCH: "1"}):
        run_scores(n, V, H, options, **kinds)


def run_exps(n, V, H, options, **kinds):
    exps = torch.zeros(n, -(-V // 8) * 8, dtype=BF16)[:, :V]
    anchored_logps_fwd(*anchored_operands(n, V, H, options, **kinds), options, exps=exps)


def run_marks(n, V, H, options, **kinds):
    marks = Marks(draw_of(n, V), integers(n, mask_words(V)))
    anchored_logps_fwd(*anchored_operands(n, V, H, options, **kinds), options, marks=marks)


def run_draw(n, V, H, options, **kinds):
    rows, head = anchored_operands(n, V, H, options, **kinds)
    linear_draw_fwd(rows, head, options, draw_of(n, V), slots(n, 5 if options else 1))


def run_moved_hidden():
    """TMA cannot address these rows: they are copied."""
    rows, head = operands(9, 600, 64)
    anchored_logps_fwd(rows._replace(hidden=view(9, 64, BF16, 3)), head, False)


def run_trial(launch, variant):
    _, ir = warp_trial.sums_of(HOST, launch, variant)
    assert "ttg.warp_specialize" in ir


def tiles() -> Iterator[Case]:
    shapes = [
        dict(n=5, V=5003, start=8192, cut=0),
        dict(n=16, V=4096, start=0, cut=3),
        dict(n=2, V=16, start=16, cut=0),
        dict(n=1, V=1, start=0, cut=0),
        dict(n=3, V=1, start=1, cut=7),
        dict(n=0, V=16, start=0, cut=0),
    ]
    for run in (run_tile_stats, run_tile_grad, run_tile_draw):
        yield from each(run.__name__[4:], run, both(shapes))


def tile_of(n, V, start, cut, options):
    rows, head = operands(n, V, 1, options=options)
    return Tile(view(n, V, FP32, cut), slice(start, start + V), head.bias, rows, head)


def run_tile_stats(n, options, **shape):
    tile = tile_of(n, options=options, **shape)
    tile_stats(tile, RowState.start(tile.rows, FP32), with_entropy=options)


def run_tile_grad(n, V, options, **shape):
    """In place; or with every option, into a tile of 16 bits."""
    tile, row = tile_of(n, V, options=options, **shape), torch.zeros(n)
    if options:
        out = torch.zeros(n, V, dtype=BF16)
        tile_grad(tile, Logps(row, row, row), Upstream(row, row), out, torch.zeros(n))
    else:
        tile_grad(tile, Logps(row, row), Upstream(row), tile.z, None)


def run_tile_draw(n, V, start, options, **shape):
    tile = tile_of(n, V, start, options=options, **shape)
    tile_draw(tile, draw_of(n, start + V), slots(n, 3 if options else 1))


def scatters() -> Iterator[Case]:
    shapes = [
        dict(n=7, V=5003, H=200, dtype=BF16),
        dict(n=16, V=4096, H=256, dtype=FP32),
        dict(n=5, V=9, H=33, dtype=BF16, cut=3),
        dict(n=1, V=1, H=1, dtype=FP32),  # the gradient of a bias has one column
        dict(n=7, V=100, H=1, dtype=FP32),
        dict(n=0, V=16, H=16, dtype=FP32),
    ]
    yield from each("scatter_rows", run_scatter, shapes)


def run_scatter(n, V, H, dtype, cut=0):
    ids, acc = integers(n, dtype=torch.int64), view(V, H, FP32, cut)
    scatter_rows(acc, ids, ids, torch.zeros(n), view(n, H, dtype, cut), 0)


def entries() -> Iterator[Case]:
    shapes = [
        dict(n=5, V=5003, H=200, K=11, dtype=BF16),
        dict(n=16, V=4096, H=256, K=1, dtype=FP32),
        dict(n=3, V=64, H=64, K=16, dtype=BF16, cut=5),
        dict(n=1, V=1, H=1, K=1, dtype=BF16),
        dict(n=0, V=16, H=16, K=4, dtype=BF16),
    ]
    yield from each("entry_logits", run_entries, both(shapes))
    bags = [
        dict(B=23, M=57, H=72, E=100, out=FP32, table=BF16),
        dict(B=16, M=16, H=1, E=32, out=FP32, table=FP32),
        dict(B=9, M=8, H=33, E=17, out=BF16, table=BF16, cut=3),
        dict(B=1, M=1, H=1, E=1, out=BF16, table=BF16),
        dict(B=4, M=0, H=16, E=0, out=FP32, table=FP32),
        dict(B=0, M=4, H=16, E=0, out=FP32, table=FP32),
    ]
    yield from each("bag_sum", run_bags, bags)


def run_entries(n, V, H, K, options, **kinds):
    rows, head = operands(n, V, H, options=options, **kinds)
    entry_logits(rows, head, integers(n, K), integers(n) if options else None, torch.zeros(n, K))


def run_bags(B, M, H, E, out, table, cut=0):
    index, bounds = integers(E, dtype=torch.int64), integers(B + 1, dtype=torch.int64)
    bag_sum(view(B, H, out, cut), view(M, H, table, cut), index, torch.zeros(E), bounds)


def softmaxes() -> Iterator[Case]:
    shapes = [
        dict(n=5, V=5003, H=200, E=100, dtype=BF16),
        dict(n=16, V=4096, H=256, E=32, dtype=FP32),
        dict(n=3, V=64, H=33, E=17, dtype=BF16, cut=3),
        dict(n=1, V=1, H=1, E=1, dtype=BF16, weight=FP32),
        dict(n=0, V=16, H=16, E=0, dtype=BF16),
    ]
    for run in (run_entry_dots, run_segment_softmax, run_entry_grads):
        yield from each(run.__name__[4:], run, both(shapes))
    yield from each("sum_by_id", run_sum_by_id, shapes)


def listed(n, V, H, E, options, **kinds):
    rows, head = operands(n, V, H, options=options, **kinds)
    index = integers(E, dtype=torch.int64)
    return rows, head, EntryList(index, index, index == 1, torch.zeros(E))


def run_entry_dots(**shape):
    rows, head, entries = listed(**shape)
    entry_dots(entries.z, rows.hidden, entries.row, head.weight, entries.ids)


def run_segment_softmax(options, **shape):
    rows, head, entries = listed(options=options, **shape)
    bounds = integers(len(rows.ids) + 1, dtype=torch.int64)
    segment_softmax(entries, bounds, rows, head, with_entropy=options)


def run_entry_grads(n, options, **shape):
    rows, head, entries = listed(n, options=options, **shape)
    row, inclusion = torch.zeros(n), torch.ones(len(entries.z))
    if options:
        entry_grads(entries, rows, head, Logps(row, row, row), Upstream(row, row), inclusion)
    else:
        entry_grads(entries, rows, head, Logps(row, row), Upstream(row))


def run_sum_by_id(**shape):
    rows, head, entries = listed(options=False, **shape)
    sum_by_id(head.weight, entries.ids, rows.hidden, entries.row, entries.z)


def token_losses() -> Iterator[Case]:
    loss = dict(name="ppo_clip", kl=("k2", "straight_through"), separate=True)
    # Whole numbers: Triton makes a 1 a constant, and passes the others as integers.
    whole = loss | dict(beta=1, parameter=1, clamp=2)
    yield from each("token_loss", run_token_loss, [{"n": n} | whole for n in (0, 1, 512)])
    yield from each("token_loss", run_token_loss, [dict(n=100, beta=0.5) | loss])


def surrogates() -> Iterator[Case]:
    kls = [("k3", "value"), ("k1", "importance"), ("abs", "score_function")]
    losses = [
        dict(n=100, name=name, kl=kls[i % 3], beta=0.5 * (i % 3), separate=i % 2 == 1)
        for i, name in enumerate(SURROGATES)
    ]
    yield from each("token_loss", run_token_loss, losses)


def run_token_loss(n, name, kl, beta, separate, parameter=0.2, clamp=math.inf):
    rule = SURROGATES[name]
    optional = (separate, rule.context is not None, beta != 0)
    tokens = Tokens(*[torch.zeros(n)] * 4, *(torch.zeros(n) if x else None for x in optional))
    parameters = tuple(parameter for _ in rule.parameters)
    objective = TokenObjective(name, parameters, *kl, beta, clamp, clamp)
    token_loss(tokens, objective, separate)


def segments() -> Iterator[Case]:
    ways = itertools.product((torch.int32, torch.int64), ("sum", "max"), (0, 1))
    segmented = [dict(dtype=dtype, op=op, cut=cut) for dtype, op, cut in ways]
    yield from each("segment_reduce", run_segments, segmented)
    yield "segment_reduce n=0", lambda: segment_reduce(torch.zeros(0), integers(1), "sum")
    ways = itertools.product((False, True), (False, True))
    groups = [dict(weighted=weighted, leave_one_out=others) for weighted, others in ways]
    yield from each("group_stats", partial(run_groups, [0, 4, 4, 9]), groups)
    yield "group_stats B=1", partial(run_groups, [0, 1], False, False)
    yield "group_stats B=0", partial(run_groups, [0], False, False)


def run_segments(dtype, op, cut):
    bounds = torch.tensor([0] * cut + [0, 3, 3, 10], dtype=dtype)[cut:]
    segment_reduce(torch.zeros(10 + cut)[cut:], bounds, op)


def run_groups(bounds, weighted, leave_one_out):
    rewards = torch.zeros(bounds[-1])
    group_stats(rewards, torch.tensor(bounds), rewards if weighted else None, leave_one_out)


def many_rows() -> Iterator[Case]:
    """More rows, bags, segments and groups than the second dimension of a grid has programs."""
    n, options = MANY, True
    row = dict(n=n, V=3, H=8, dtype=BF16)
    yield from each("linear_logps", run_linear, [row | dict(options=options)])
    for run in (run_tile_stats, run_tile_grad, run_tile_draw):
        yield from each(run.__name__[4:], run, [dict(n=n, V=3, start=0, cut=0, options=options)])
    yield from each("scatter_rows", run_scatter, [row])
    yield from each("entry_logits", run_entries, [row | dict(K=2, options=options)])
    bags = dict(B=n, M=3, H=8, E=5, out=FP32, table=BF16)
    yield from each("bag_sum", run_bags, [bags, bags | dict(H=1, table=FP32)])
    for run in (run_entry_dots, run_segment_softmax, run_entry_grads):
        yield from each(run.__name__[4:], run, [row | dict(E=n, options=options)])
    yield from each("sum_by_id", run_sum_by_id, [row | dict(E=n)])
    loss = dict(name="ppo_clip", kl=("k3", "value"), beta=0.5, separate=True)
    yield from each("token_loss", run_token_loss, [dict(n=n) | loss])
    bounds = torch.arange(n + 1)
    yield f"segment_reduce n={n}", lambda: segment_reduce(torch.zeros(n), bounds, "sum")
    yield f"group_stats n={n}", lambda: run_groups(bounds.tolist(), False, False)


def usual(arch: str) -> Iterator[Case]:
    """Every case on one part; on the others the longest form of each, with every option."""
    whole = arch == "sm_90"
    families = [linear, tiles, scatters, entries, softmaxes, token_losses, segments]
    if whole:
        families += [surrogates, many_rows]
    for name, run in itertools.chain(anchored(arch), *(family() for family in families)):
        if whole or "options=False" not in name:
            yield name, run
