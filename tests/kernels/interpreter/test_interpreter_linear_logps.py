"""`linear_logps_fwd` against plain fp64 formulas on the same inputs."""

from __future__ import annotations

import pytest
import torch

from fastgrpo_kernels import Head, Rows, linear_logps_fwd
from fastgrpo_kernels.runtime import launch_for
from score_oracle import assert_accurate, oracle, problem, transformed

BLOCKS = launch_for("linear_logps", 16, "interpreter").blocks
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n, vocab, hidden_size",
    [
        (1, 1009, 40),  # one row; H below one block
        (70, 1009, 72),  # no dimension a multiple of its block, V prime, two splits
        (3, 517, 128),  # the last split holds 5 columns; H is whole blocks
        (2, 7, 16),  # everything below one block
        (2, 1, 40),  # one entry
        (2, 601, 1),  # one column
    ],
)
def test_shapes_and_dtypes(n, vocab, hidden_size, dtype):
    rows, head = problem(n, vocab, hidden_size, dtype)
    actual = linear_logps_fwd(rows, head, True)
    assert_accurate(actual, oracle(rows, head))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit_scale, softcap", [(0.25, 0.0), (1.0, 30.0), (2.0, 5.0)])
def test_logit_transform(logit_scale, softcap, dtype):
    rows, head = problem(9, 601, 48, dtype, spread=8.0)
    rows, head = transformed(rows, head, logit_scale, softcap)
    assert_accurate(linear_logps_fwd(rows, head, True), oracle(rows, head))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_weight_under_16_bit_hidden(dtype):
    """Both count in fp32: rounding the weight first would cost 1e-2 nats."""
    rows, head = problem(5, 601, 40, dtype, weight_dtype=torch.float32)
    head = head._replace(bias=torch.linspace(-1, 1, 601))
    assert_accurate(linear_logps_fwd(rows, head, True), oracle(rows, head))


def test_without_entropy_is_bitwise_the_same():
    rows, head = problem(5, 601, 40, torch.bfloat16)
    with_entropy = linear_logps_fwd(rows, head, True)
    without = linear_logps_fwd(rows, head, False)
    assert without.entropy is None
    assert torch.equal(with_entropy.logps, without.logps)
    assert torch.equal(with_entropy.lse, without.lse)


def test_a_row_does_not_depend_on_its_batch():
    """Bitwise: alone, in another place, among other rows, in another group of blocks.

    Small integers, whose dot products are exact in any order: the order inside one block is that of
    the interpreter's BLAS, which depends on the place, and not of the kernel.
    """
    n = 5 * BLOCKS["BLOCK_N"] + 3
    rows, head = problem(n, 601, 40, torch.float32)
    rows = rows._replace(hidden=(rows.hidden * 2).round().bfloat16())
    head = head._replace(weight=(head.weight * 4).round().bfloat16() / 8)
    whole = linear_logps_fwd(rows, head, True)
    for row in (0, 1, BLOCKS["BLOCK_N"] + 7, n - 1):
        alone = linear_logps_fwd(rows[row : row + 1], head, True)
        assert all(torch.equal(a[0], w[row]) for a, w in zip(alone, whole, strict=True)), row
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    moved = linear_logps_fwd(rows[order], head, True)
    assert all(torch.equal(m, w[order]) for m, w in zip(moved, whole, strict=True))


def test_layouts():
    """Strided rows, an offset that is not 16-byte aligned, columns that are not adjacent."""
    rows, head = problem(6, 601, 40, torch.bfloat16)
    expected = linear_logps_fwd(rows, head, True)
    wide_hidden, wide_weight = torch.randn(6, 61).bfloat16(), torch.randn(601, 43).bfloat16()
    hidden, weight = rows.hidden, head.weight
    wide_hidden[:, 3:43], wide_weight[:, 1:41] = hidden, weight
    variants = {
        "strided": (wide_hidden[:, 3:43], wide_weight[:, 1:41]),
        "transposed": (hidden.T.contiguous().T, weight.T.contiguous().T),
    }
    for name, (h, w) in variants.items():
        actual = linear_logps_fwd(rows._replace(hidden=h), head._replace(weight=w), True)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), name


def test_id_outside_the_vocabulary_is_nan_for_that_row_only():
    vocab = 601  # 602 .. 768 are padding columns of the last block
    rows, head = problem(8, vocab, 40, torch.float32)
    expected = oracle(rows, head)
    bad = {1: -1, 3: vocab, 4: vocab + 60, 6: 2**40 + 5}
    broken = rows.ids.clone()
    for row, id_ in bad.items():
        broken[row] = id_
    logps, lse, entropy = linear_logps_fwd(rows._replace(ids=broken), head, True)
    good = [row for row in range(8) if row not in bad]
    assert logps[list(bad)].isnan().all()
    assert_accurate((logps[good], lse, entropy), (expected[0][good], *expected[1:]))


def test_minus_infinity_logits_count_for_nothing():
    """Through the bias: single columns, a whole block, a whole split; then a target among them."""
    rows, head = problem(6, 1100, 40, torch.float32)
    bias = torch.zeros(1100)
    bias[::7] = -torch.inf
    bias[512:1024] = -torch.inf
    rows.ids[:] = torch.tensor([1, 2, 3, 1030, 1031, 4])
    head = head._replace(bias=bias)
    assert_accurate(linear_logps_fwd(rows, head, True), oracle(rows, head))
    rows.ids[0] = 7
    logps, lse, entropy = linear_logps_fwd(rows, head, True)
    assert logps[0] == -torch.inf and lse.isfinite().all() and entropy.isfinite().all()
    assert logps[1:].isfinite().all()


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_large_logits(level):
    """All logits near +-1e4: as accurate as fp32 logits of that size can be (1e-3 per logit)."""
    rows, head = problem(4, 601, 40, torch.float32)
    head = head._replace(bias=torch.full((601,), level))
    actual = linear_logps_fwd(rows, head, True)
    assert_accurate(actual, oracle(rows, head), atol=3e-3, rms=2e-3)
    assert (actual.logps <= 0).all()


def test_certain_and_impossible_tokens():
    """p = 1 to the last bit is never above 0; log-probs below fp32's exp are still right."""
    weight = torch.zeros(601, 40)
    weight[5, 0], weight[7, 0] = 60.0, -60.0
    hidden = torch.zeros(2, 40)
    hidden[:, 0] = 1.0
    rows, head = Rows(hidden, torch.tensor([5, 7])), Head(weight)
    logps, _, entropy = linear_logps_fwd(rows, head, True)
    assert logps[0] == 0 and abs(logps[1] + 120) < 2e-5
    assert 0 <= entropy.min() and entropy.max() < 1e-20


def test_nan_stays_in_its_row():
    rows, head = problem(4, 601, 40, torch.float32)
    rows.hidden[2, 3] = torch.nan
    actual = linear_logps_fwd(rows, head, True)
    expected = oracle(rows, head)
    keep = [0, 1, 3]
    assert all(a[2].isnan() for a in actual)
    assert_accurate([a[keep] for a in actual], [e[keep] for e in expected])


def test_no_rows():
    rows, head = problem(0, 33, 16, torch.float32)
    actual = linear_logps_fwd(rows, head, True)
    assert [a.shape for a in actual] == [(0,)] * 3
