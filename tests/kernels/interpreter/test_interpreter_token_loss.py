"""`token_loss` and `segment_reduce`: the kernels against their torch twins, from the same source.

tests/kernels/test_surrogates.py compares the source itself with autograd of the formulas.
"""

from __future__ import annotations

import pytest
import torch

from fastgrpo import torch_kernels
from fastgrpo_kernels import STATS, TokenObjective, Tokens, segment_reduce, token_loss
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS, KL_GRADIENTS
from fastgrpo_kernels.surrogates import SURROGATES
from row_oracle import HIGH, LOW, loss_of, loss_tokens, parameters


def assert_same(tokens, loss, separate):
    actual = token_loss(tokens, loss, separate)
    twin = torch_kernels.token_loss(tokens, loss, separate)
    for x, y in zip(actual[:3], twin[:3], strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(actual[3], twin[3], rtol=1e-5, atol=1e-5)
    return actual


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_is_its_twin_on_every_edge(name, separate):
    """The same source on the same fp32 bits: they may differ by rounding, never by a branch."""
    tokens = loss_tokens()
    assert_same(tokens, loss_of(name), separate)
    assert_same(Tokens(*tokens[:4]), loss_of(name), separate)


@pytest.mark.parametrize("clamps", [(), (0.4, 0.05)])
@pytest.mark.parametrize("gradient", KL_GRADIENTS)
@pytest.mark.parametrize("kl", KL_ESTIMATORS)
def test_every_kl_is_its_twin(kl, gradient, clamps):
    for name, separate in (("ppo_clip", False), ("cispo", True)):
        loss = TokenObjective(name, parameters(name), kl, gradient, 0.07, *clamps)
        terms = assert_same(loss_tokens(), loss, separate)
        assert (terms.dratio is not None) == separate


def test_stats_are_sums_and_extrema():
    tokens = loss_tokens()
    logps, log_ratio, advantages, *_, ref_logps = tokens
    stats = token_loss(tokens, loss_of("ppo_clip")).stats
    x, r = (ref_logps - logps).double(), log_ratio.double().exp()
    # Ratios on an edge may fall to either side of it in fp32.
    clear = ((r - 1 + LOW).abs() > 1e-6) & ((r - 1 - HIGH).abs() > 1e-6) & ((r - 3).abs() > 1e-6)
    edge = (~clear).sum()
    low, high = (r < 1 - LOW) & (advantages < 0), (r > 1 + HIGH) & (advantages > 0)
    high |= (r > 3) & (advantages < 0)
    expected = {
        "kl": (torch.expm1(x) - x).sum(),
        "ratio": r.sum(),
        "clip_low": (low & clear).sum(),
        "clip_high": (high & clear).sum(),
        "ratio_min": r.min(),
        "ratio_max": r.max(),
    }
    assert tuple(expected) == STATS and expected["clip_low"] > 9 and expected["clip_high"] > 9
    for name, value in zip(STATS, stats.double(), strict=True):
        if name.startswith("clip"):
            assert expected[name] <= value <= expected[name] + edge
        else:
            torch.testing.assert_close(value, expected[name].double(), rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize("n", [0, 1, 129])
def test_row_counts(n):
    tokens = Tokens(*(x[:n].clone() for x in loss_tokens()))
    options = loss_of("ppo_clip", beta=0.1)
    loss, dlogps, dratio, stats = token_loss(tokens, options, separate=True)
    assert loss.shape == dlogps.shape == dratio.shape == (n,) and stats.shape == (len(STATS),)
    assert loss.isfinite().all() and stats.isfinite().all()
    assert abs(stats[1] - tokens.log_ratio.exp().sum()) < 1e-3
    again = token_loss(tokens, options, separate=True)
    assert torch.equal(stats, again.stats) and torch.equal(dlogps, again.dlogps)


def test_overflow_is_finite_and_costs_nothing_without_advantage():
    log_ratio = torch.tensor([100.0, 100.0, 100.0, 1e30])
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0])
    logps, weights = torch.full((4,), -1.0), torch.full((4,), 0.25)
    tokens = Tokens(logps, log_ratio, advantages, weights, ref_logps=logps + 200)
    options = TokenObjective("ppo_clip", (LOW, HIGH, float("inf")), beta=1e-3)
    loss, dlogps, dratio, stats = token_loss(tokens, options, separate=True)
    for x in (loss, dlogps, dratio, stats):
        assert x.isfinite().all()
    assert dratio[0] == 0 and dratio[1] > 1e33 and (dratio[2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("op", ["sum", "max"])
def test_segment_reduce(op, dtype):
    """Segments of one, of several blocks, of exactly one block, and empty ones anywhere."""
    lengths = torch.tensor([0, 1, 70, 0, 0, 32, 5, 0])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(dtype)
    x = -3 + torch.randn(108, generator=torch.Generator().manual_seed(0))
    parts = [part.double() for part in x.split(lengths.tolist()) if len(part)]
    expected = torch.cat([getattr(part, op)().expand(len(part)) for part in parts])
    for implementation in (segment_reduce, torch_kernels.segment_reduce):
        actual = implementation(x, cu_seqlens, op).double()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_segment_reduce_of_nothing():
    for bounds in (torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        assert segment_reduce(torch.empty(0), bounds, "sum").shape == (0,)
