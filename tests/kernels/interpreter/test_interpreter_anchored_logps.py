"""`anchored_logps_fwd` against plain fp64 formulas on the same inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from fastgrpo_kernels import Head, Rows, anchored_logps_fwd, has_anchored, linear_logps_fwd
from fastgrpo_kernels import anchored_logps as anchored
from fastgrpo_kernels.runtime import launch_for
from score_oracle import (
    DTYPES,
    TRANSFORMS,
    assert_accurate,
    assert_exps,
    assert_marks,
    confident,
    marks_of,
    oracle,
    problem,
)

BLOCKS = launch_for("anchored_logps", 16, "interpreter").blocks


def room_for(n, vocab):
    """An uninitialised tile of exponentials, whose rows TMA can address."""
    return torch.empty((n, -(-vocab // 8) * 8), dtype=torch.bfloat16)[:, :vocab]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n, vocab, hidden_size",
    [
        (1, 1009, 40),  # one row; H below one block
        (70, 1009, 72),  # no dimension a multiple of its block, V prime, more tiles than programs
        (3, 517, 128),  # the last tile holds 5 columns; H is whole blocks
        (2, 7, 16),  # everything below one block
        (2, 1, 8),  # a vocabulary of one entry
        (3, 1024, 48),  # whole tiles of the vocabulary
    ],
)
def test_shapes_and_dtypes(n, vocab, hidden_size, dtype):
    rows, head = problem(n, vocab, hidden_size, dtype)
    assert has_anchored(rows, head)
    result = anchored_logps_fwd(rows, head, True)
    assert_accurate(result.scored, oracle(rows, head))
    assert (result.scored.logps <= 0).all() and not result.redone.any()


@pytest.fixture
def exp2_of_a_gpu(monkeypatch):
    """ex2.approx has a relative error of 2^-22: here anything up to that, at random."""
    builder = interpreter.interpreter_builder
    exact, random, used = builder.create_exp2, np.random.default_rng(0), []

    def approximate(x):
        used.append(x)
        y = exact(x)
        y.data = (y.data * (1 + random.uniform(-1, 1, y.data.shape) * 2.0**-22)).astype(np.float32)
        return y

    monkeypatch.setattr(builder, "create_exp2", approximate)
    yield
    assert used


@pytest.mark.parametrize("vocab", [50_021, pytest.param(151_936, marks=pytest.mark.slow)])
def test_the_entropy_of_a_large_vocabulary(exp2_of_a_gpu, vocab):
    """Flat logits, an entropy of 10 nats: it multiplies whatever error the normalizer has."""
    rows, head = problem(16, vocab, 64, torch.bfloat16, spread=1.0)
    result = anchored_logps_fwd(rows, head, True)
    assert_accurate(result.scored, oracle(rows, head))
    assert not result.redone.any()


@pytest.mark.parametrize("with_exps", [False, True], ids=["scores", "exps"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_logit_transform(transform, with_exps):
    rows, head = problem(9, 601, 48, torch.bfloat16, spread=8.0)
    rows, head = transform(rows, head)
    exps = room_for(9, 601) if with_exps else None
    result = anchored_logps_fwd(rows, head, True, exps=exps)
    assert_accurate(result.scored, oracle(rows, head))
    if with_exps:
        assert_exps(exps, result, rows, head)


def test_without_entropy_is_bitwise_the_same():
    rows, head = problem(5, 601, 40, torch.bfloat16)
    with_entropy = anchored_logps_fwd(rows, head, True).scored
    without = anchored_logps_fwd(rows, head, False).scored
    assert without.entropy is None
    assert torch.equal(with_entropy.logps, without.logps)
    assert torch.equal(with_entropy.lse, without.lse)


def test_a_row_does_not_depend_on_its_batch(monkeypatch):
    """Bitwise: alone, elsewhere, among others, in another buffer of partials; flagged rows too.

    Small integers, whose dot products are exact in any order: the order inside one block is that of
    the interpreter's BLAS, which depends on the place, and not of the kernel.
    """
    n = 5 * BLOCKS["BLOCK_N"] + 3
    rows, head = problem(n, 601, 40, torch.float32)
    rows = rows._replace(hidden=(rows.hidden * 2).round().bfloat16())
    head = head._replace(weight=(head.weight * 4).round().bfloat16() / 8)
    rows.hidden[5::31] *= 32

    def scores(some):
        exps = room_for(len(some), 601)
        result = anchored_logps_fwd(rows[some], head, True, exps=exps)
        return *result.scored, result.log_scale, result.redone, exps

    whole = scores(torch.arange(n))
    assert 0 < whole[4].sum() < n / 4
    monkeypatch.setattr(anchored, "PARTIALS_BYTES", 4 * 2 * 5 * 40)  # 40 rows of 5 tiles
    some = [torch.tensor([row]) for row in (0, 1, 5, BLOCKS["BLOCK_N"] + 7, n - 1)]
    for rows_of in (*some, torch.randperm(n, generator=torch.Generator().manual_seed(3))):
        for a, w in zip(scores(rows_of), whole, strict=True):
            assert torch.equal(a, w[rows_of])


def test_which_operands_it_takes():
    rows, head = problem(6, 601, 40, torch.bfloat16)
    hidden, weight, wide = rows.hidden, head.weight, torch.randn(601, 44).bfloat16()
    refused = {
        "fp32": (hidden.float(), weight.float()),
        "two dtypes": (hidden, weight.float()),
        "H of 36": (hidden[:, :36], weight[:, :36].contiguous()),
        "rows of 88 bytes": (hidden, wide[:, :40]),
        "an odd address": (hidden, torch.randn(601, 48).bfloat16()[:, 4:44]),
        "columns that are not adjacent": (hidden, weight.T.contiguous().T),
    }
    assert not [
        name for name, (h, w) in refused.items() if has_anchored(Rows(h, rows.ids), Head(w))
    ]
    # A hidden that TMA cannot address is copied: the way must not depend on where rows lie.
    expected = anchored_logps_fwd(rows, head, True)
    strided, shifted = torch.randn(6, 61).bfloat16(), torch.randn(241).bfloat16()
    strided[:, 3:43], shifted[1:] = hidden, hidden.flatten()
    for h in (strided[:, 3:43], shifted[1:].view(6, 40), hidden.T.contiguous().T):
        moved = rows._replace(hidden=h)
        assert has_anchored(moved, head)
        actual = anchored_logps_fwd(moved, head, True)
        assert all(torch.equal(a, e) for a, e in zip(actual.scored, expected.scored, strict=True))
        assert torch.equal(actual.log_scale, expected.log_scale)


@pytest.mark.parametrize("with_exps", [False, True], ids=["scores", "exps"])
def test_rows_beyond_the_safe_range_are_done_again(with_exps):
    gaps = [20.0, 8.0, 60.0, 0.0, -40.0, -100.0, -120.0, -200.0, -1000.0]
    rows, head = confident(gaps)
    exps = room_for(len(gaps), 601) if with_exps else None
    result = anchored_logps_fwd(rows, head, True, exps=exps)
    assert result.redone.tolist() == [gap < -109 for gap in gaps]
    assert (result.log_scale[result.redone] == 0).all()
    expected = oracle(rows, head)
    assert_accurate(result.scored, expected, atol=6e-5, rms=3e-5)  # logits of 1000: 6e-5 is one bit
    # Of a token that is nearly certain even the distance from 0 is right.
    assert (result.scored.logps[:2] / expected[0][:2] - 1).abs().max() <= 1e-5
    if with_exps:
        assert_exps(exps, result, rows, head)


@pytest.mark.parametrize("with_exps", [False, True], ids=["scores", "exps"])
def test_minus_infinity_in_the_bias(with_exps):
    """Single columns, a whole tile, a target: nothing else changes."""
    rows, head = problem(6, 601, 40, torch.bfloat16)
    bias = torch.zeros(601).bfloat16()
    bias[::7] = -torch.inf
    bias[128:256] = -torch.inf
    rows.ids[:] = torch.tensor([1, 2, 3, 600, 300, 7])
    head = head._replace(bias=bias)
    exps = room_for(6, 601) if with_exps else None
    result = anchored_logps_fwd(rows, head, True, exps=exps)
    assert result.redone.tolist() == [False] * 5 + [True]
    expected = oracle(rows, head)
    assert result.scored.logps[5] == -torch.inf
    logps, *others = result.scored
    assert_accurate((logps[:5], *others), (expected[0][:5], *expected[1:]))
    if with_exps:
        assert_exps(exps, result, rows, head)


def test_bad_rows_stay_alone():
    """NaN and inf in a row of hidden, ids outside the vocabulary: the portable kernel's answers."""
    rows, head = problem(9, 601, 40, torch.bfloat16)
    rows.hidden[1, 3], rows.hidden[2, 0] = torch.nan, torch.inf
    rows.ids[4], rows.ids[5], rows.ids[6] = -1, 601, 2**40 + 5
    result = anchored_logps_fwd(rows, head, True)
    portable = linear_logps_fwd(rows, head, True)
    bad = [1, 2, 4, 5, 6]
    assert result.redone.nonzero()[:, 0].tolist() == bad
    for actual, expected in zip(result.scored, portable, strict=True):
        assert torch.equal(actual[bad].isnan(), expected[bad].isnan())
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive(scale):
    """Nobody has one; the portable kernel does it."""
    rows, head = problem(5, 601, 40, torch.bfloat16)
    head, exps = head._replace(logit_scale=scale), room_for(5, 601)
    result = anchored_logps_fwd(rows, head, True, exps=exps)
    assert_accurate(result.scored, oracle(rows, head))
    assert result.redone.all()
    assert_exps(exps, result, rows, head)


def test_no_rows():
    rows, head = problem(0, 33, 16, torch.bfloat16)
    result = anchored_logps_fwd(rows, head, True)
    assert [x.shape for x in (*result.scored, result.log_scale, result.redone)] == [(0,)] * 5


# ---- drawing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_mask_is_that_of_the_formula(transform):
    n, vocab, tau = 70, 1009, 1e-2
    rows, head = problem(n, vocab, 40, torch.bfloat16)
    rows, head = transform(rows, head)
    lse = oracle(rows, head)[1]
    off = torch.randn(n, generator=torch.Generator().manual_seed(2)) * 0.1
    marks = marks_of(n, vocab, (lse + off + math.log(tau)).float())
    result = anchored_logps_fwd(rows, head, True, marks=marks)
    assert_accurate(result.scored, oracle(rows, head))
    assert torch.allclose(result.log_scale, marks.draw.anchor - result.scored.lse, atol=1e-5)
    assert_marks(marks, rows, head)


def test_a_hopeless_anchor_is_flagged():
    """The estimate decides what is drawn; scores are right for any."""
    rows, head = problem(5, 601, 40, torch.bfloat16)
    anchors = torch.tensor([0.0, 1e3, -1e3, torch.inf, torch.nan])
    result = anchored_logps_fwd(rows, head, True, marks=marks_of(5, 601, anchors))
    assert result.redone.tolist() == [False, True, True, True, True]
    assert_accurate(result.scored, oracle(rows, head))
