"""The passes over a tile of logits against plain fp64 formulas and fp64 autograd."""

from __future__ import annotations

import pytest
import torch

from fastgrpo_kernels import (
    Head,
    Logps,
    Rows,
    RowState,
    Tile,
    Upstream,
    scatter_rows,
    tile_grad,
    tile_stats,
)

N, VOCAB = 7, 1201  # three blocks of the interpreter's launch, the last one ragged
SLICES = {"one": [(0, VOCAB)], "three": [(0, 500), (500, 501), (501, VOCAB)]}
UPSTREAM = Upstream(torch.linspace(-1, 2.2, N), torch.linspace(1.1, -2, N))  # both signs
TRANSFORMS = {
    "plain": {},
    "all": {"bias": True, "inv_temperature": True, "logit_scale": 0.5, "softcap": 20.0},
    "no softcap": {"bias": True, "inv_temperature": True, "logit_scale": 2.0},
}


def problem(bias=False, inv_temperature=False, logit_scale=1.0, softcap=0.0):
    """(z0, ids, bias, inv_temperature, logit_scale, softcap); ids at slice edges, two likely."""
    g = torch.Generator().manual_seed(0)
    z0 = 5 * torch.randn(N, VOCAB, generator=g)
    ids = torch.tensor([0, 499, 500, 501, VOCAB - 1, 3, 4])
    z0[5, 3], z0[6, 4] = 40.0, 25.0
    b = torch.randn(VOCAB, generator=g) if bias else None
    t = torch.linspace(0.5, 2.0, N) if inv_temperature else None
    return z0, ids, b, t, logit_scale, softcap


def transform(z0, bias, inv_temperature, logit_scale, softcap):
    """fp64 logits of the softmax from raw ones, differentiable."""
    z = z0.double() if bias is None else z0.double() + bias.double()
    z = z * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return z if inv_temperature is None else z * inv_temperature.double()[:, None]


def entropy_of(logps):
    return -torch.where(logps == -torch.inf, 0.0, logps.exp() * logps).sum(1)


def tile_of(z0, ids, bias, inv_temperature, logit_scale, softcap, start=0, end=VOCAB):
    """A slice of z0 as a strided view of it."""
    v = slice(start, end)
    rows = Rows(torch.empty(len(ids), 0), ids, inv_temperature)
    head = Head(torch.empty(0), bias, logit_scale, softcap)
    return Tile(z0[:, v], v, None if bias is None else bias[v], rows, head)


def chain(*problem, slices, with_entropy=True):
    """RowState after all slices."""
    state = RowState.start(tile_of(*problem).rows, torch.float32)
    for start, end in slices:
        tile_stats(tile_of(*problem, start, end), state, with_entropy)
    return state


def assert_accurate(actual, expected, *, atol=2e-5, rms=1e-5):
    for name, a, e in zip(("logps", "lse", "entropy"), actual, expected, strict=True):
        error = (a.double() - e).abs()
        assert error.max() <= atol, (name, error.max())
        assert error.square().mean().sqrt() <= rms, (name, error)


@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_tile_stats(options, slices):
    z0, ids, *rest = problem(**options)
    before = z0.clone()
    logps = transform(z0, *rest).log_softmax(1)
    expected = (
        logps.gather(1, ids[:, None])[:, 0],
        transform(z0, *rest).logsumexp(1),
        entropy_of(logps),
    )
    assert_accurate(chain(z0, ids, *rest, slices=slices).finish(True), expected)
    assert torch.equal(z0, before)


def test_chained_tiles_equal_one_tile():
    """The order of the merges is all that differs: rounding, and the same maximum and target."""
    z0, ids, *rest = problem(**TRANSFORMS["all"])
    one, three = (chain(z0, ids, *rest, slices=slices) for slices in SLICES.values())
    assert torch.equal(one.max, three.max) and torch.equal(one.target, three.target)
    torch.testing.assert_close(one.sum, three.sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.dot, three.dot, rtol=1e-5, atol=1e-6)


def test_tile_stats_without_entropy_leaves_dot_alone():
    z0, ids, *rest = problem()
    with_entropy = chain(z0, ids, *rest, slices=SLICES["three"])
    without = chain(z0, ids, *rest, slices=SLICES["three"], with_entropy=False)
    assert torch.equal(with_entropy.sum, without.sum) and (without.dot == 0).all()


def test_tile_stats_minus_infinity_extremes_and_foreign_ids():
    """-inf logits (a whole first slice of them, too), logits near +-1e4, ids of no slice."""
    z0, ids, *rest = problem()
    z0[0, :501] = -torch.inf
    z0[1, ::2] = -torch.inf
    z0[2] += 1e4
    z0[3] -= 1e4
    z0[4, 1] = torch.nan
    ids[0], ids[1], ids[5], ids[6] = 700, 499, -1, VOCAB
    logps = z0.double().log_softmax(1)
    expected = (
        logps.gather(1, ids.clamp(0, VOCAB - 1)[:, None])[:, 0],
        z0.double().logsumexp(1),
        entropy_of(logps),
    )
    actual = chain(z0, ids, *rest, slices=SLICES["three"]).finish(True)
    for rows, bars in (([0, 1], {}), ([2, 3], {"atol": 2e-3, "rms": 2e-3})):
        assert_accurate([a[rows] for a in actual], [e[rows] for e in expected], **bars)
    assert all(a[4].isnan() for a in actual)
    assert actual.logps[5:].isnan().all()
    for a, e in zip((actual.lse, actual.entropy), expected[1:], strict=True):
        assert (a[5:].double() - e[5:]).abs().max() <= 2e-5


def gradient(z0, ids, bias, inv_temperature, logit_scale, softcap, dlogps, dentropy):
    """fp64 autograd of sum(dlogps * logps + dentropy * entropy), to the raw logits."""
    z0 = z0.double().requires_grad_()
    logps = transform(z0, bias, inv_temperature, logit_scale, softcap).log_softmax(1)
    total = (dlogps.double() * logps.gather(1, ids[:, None])[:, 0]).sum()
    if dentropy is not None:
        p_logp = torch.where(logps == -torch.inf, 0.0, logps.exp() * logps.clamp(min=-1e30))
        total = total - (dentropy.double() * p_logp.sum(1)).sum()
    return torch.autograd.grad(total, z0)[0]


def tiled_gradient(z0, *problem, upstream, slices, out=None):
    """`tile_grad` over slices into `out` (None: in place, of a copy)."""
    scored = chain(z0, *problem, slices=slices).finish(True)
    z0 = z0.clone()
    out = z0 if out is None else out
    for start, end in slices:
        tile_grad(tile_of(z0, *problem, start, end), scored, upstream, out[:, start:end], None)
    return out


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("slices", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_tile_grad_in_place(options, slices, with_entropy):
    z0, ids, *rest = problem(**options)
    upstream = UPSTREAM if with_entropy else Upstream(UPSTREAM.dlogps)
    expected = gradient(z0, ids, *rest, *upstream)
    actual = tiled_gradient(z0, ids, *rest, upstream=upstream, slices=slices)
    # Rows 5 and 6 are certain: their own gradient is of the size of the rounding of lse.
    for rows in (slice(None), 0, 1, 2, 3, 4):
        assert relative_error(actual[rows], expected[rows]) < 1e-5, rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tile_grad_into_16_bits_rounds_to_nearest(dtype):
    z0, ids, *rest = problem(**TRANSFORMS["all"])
    exact = tiled_gradient(z0, ids, *rest, upstream=UPSTREAM, slices=SLICES["three"])
    out = torch.full_like(z0, torch.nan, dtype=dtype)
    actual = tiled_gradient(z0, ids, *rest, upstream=UPSTREAM, slices=SLICES["three"], out=out)
    assert torch.equal(actual, exact.to(dtype))


def test_tile_grad_with_a_separate_target():
    """The target's entry leaves the tile in fp32; the rows of other slices are left alone."""
    z0, ids, *rest = problem(**TRANSFORMS["all"])
    whole = tiled_gradient(z0, ids, *rest, upstream=UPSTREAM, slices=SLICES["one"])
    scored = chain(z0, ids, *rest, slices=SLICES["one"]).finish(True)
    start, end = 500, VOCAB
    out = torch.full((N, end - start), torch.nan, dtype=torch.bfloat16)
    dtarget = torch.full((N,), -77.0)
    tile_grad(tile_of(z0, ids, *rest, start, end), scored, UPSTREAM, out, dtarget)
    inside = ids >= start
    assert (dtarget[~inside] == -77.0).all()
    assert torch.equal(dtarget[inside], whole.gather(1, ids[:, None])[inside, 0])
    expected = whole.scatter(1, ids[:, None], 0.0)[:, start:end]
    assert torch.equal(out, expected.bfloat16())


def test_tile_grad_of_a_nearly_certain_token_keeps_its_digits():
    """1 - p at the target: with p = 1 - 2e-7, a difference from 1 would be wrong by half."""
    z0 = torch.zeros(1, 1201)
    z0[0, 3] = 22.5
    ids, one = torch.tensor([3]), torch.ones(1)
    rest = (None, None, 1.0, 0.0)
    expected = gradient(z0, ids, *rest, one, None)
    # lse from fp64: rounding it to fp32 is the caller's, and costs 1e-6 of its own.
    lse = z0.double().logsumexp(1)
    shifted = (z0.double() - lse[:, None]).float()  # logits whose lse is 0: exact in fp32
    scored = Logps(shifted[:, 3], torch.zeros(1))
    tile_grad(tile_of(shifted, ids, *rest), scored, Upstream(one), shifted, None)
    assert 1e-7 < expected[0, 3] < 1e-6
    torch.testing.assert_close(shifted[0, 3].double(), expected[0, 3], rtol=1e-5, atol=0)


def test_tile_grad_minus_infinity_logits_are_zero():
    z0, ids, *rest = problem()
    z0[:, 7::3] = -torch.inf
    ids[:] = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    actual = tiled_gradient(z0, ids, *rest, upstream=UPSTREAM, slices=SLICES["three"])
    assert (actual[:, 7::3] == 0).all()
    live = z0[0] > -torch.inf
    expected = gradient(z0[:, live], live.cumsum(0)[ids] - 1, *rest, *UPSTREAM)
    assert relative_error(actual[:, live], expected) < 1e-5


def test_tile_grad_sums_to_zero_over_the_vocabulary():
    z0, ids, *rest = problem()
    upstream = Upstream(torch.ones(N), torch.ones(N))
    actual = tiled_gradient(z0, ids, *rest, upstream=upstream, slices=SLICES["three"])
    assert actual.double().sum(1).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden_size", [1, 40, 130])  # a bias; below one block; three blocks
def test_scatter_rows(hidden_size, dtype):
    """Runs of one, of several and of many rows; ids before, in and after the slice."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30, (45,), generator=g)
    ids[:11] = 17  # longer than several blocks of rows
    sorted_ids, order = ids.sort(stable=True)
    rows = torch.randn(45, hidden_size, generator=g).to(dtype)
    coef = torch.randn(45, generator=g)
    start, size = 8, 17
    acc = torch.randn(size, hidden_size, generator=g)
    inside = (ids >= start) & (ids < start + size)
    expected = acc.double().index_add(
        0, ids[inside] - start, coef[inside, None].double() * rows[inside].double()
    )
    first, second = acc.clone(), acc.clone()
    scatter_rows(first, sorted_ids, order, coef, rows, start)
    scatter_rows(second, sorted_ids, order, coef, rows, start)
    torch.testing.assert_close(first.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, second)
    untouched = ~torch.isin(torch.arange(start, start + size), ids)
    assert untouched.any() and torch.equal(first[untouched], acc[untouched])


def test_scatter_rows_layouts_and_no_rows():
    """Strided and transposed rows, a view of the accumulator, ids outside any slice, n = 0."""
    rows, coef = torch.randn(5, 9), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    ids, order = torch.tensor([-3, 2, 2, 4, 99]), torch.tensor([4, 1, 3, 0, 2])
    expected = torch.zeros(6, 9)
    expected[2] = 2.0 * rows[1] + 4.0 * rows[3]
    expected[4] = 1.0 * rows[0]
    wide = torch.zeros(6, 20)
    wide_rows = torch.randn(5, 20)
    wide_rows[:, 2:11] = rows
    for variant in (rows, rows.T.contiguous().T, wide_rows[:, 2:11]):
        wide.zero_()
        scatter_rows(wide[:, 3:12], ids, order, coef, variant, 0)
        torch.testing.assert_close(wide[:, 3:12], expected)
        assert (wide[:, :3] == 0).all() and (wide[:, 12:] == 0).all()
    scatter_rows(wide[:, 3:12], ids[:0], order[:0], coef[:0], rows[:0], 0)
    torch.testing.assert_close(wide[:, 3:12], expected)
