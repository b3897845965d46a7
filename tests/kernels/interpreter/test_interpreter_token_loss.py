"""`token_loss` and `segment_mean` against fp64 formulas, autograd and the torch twins."""

from __future__ import annotations

import pytest
import torch

from fastgrpo_kernels import STATS, segment_mean, token_loss
from fastgrpo_kernels.surrogates import KL_ESTIMATORS, SURROGATES, torch_twin

LOW, HIGH = 0.2, 0.28
N = 300  # two whole blocks of the interpreter's launch and a ragged one


def problem():
    """Rows at, around and far from every clip edge, with both signs of advantage and 0."""
    g = torch.Generator().manual_seed(0)
    edges = torch.tensor([1 - LOW, 1 + HIGH, 1.1, 3.0, 1.0]).log()
    log_ratio = torch.cat([edges, edges + 1e-4, edges - 1e-4, edges + 0.1, edges - 0.1])
    log_ratio = torch.cat([log_ratio.repeat(10), torch.randn(N - 250, generator=g)])
    logps = -3 * torch.rand(N, generator=g)
    advantages = torch.randn(N, generator=g)
    advantages[::11] = 0.0
    ref_logps = logps + 0.5 * torch.randn(N, generator=g)
    return logps, log_ratio, ref_logps, advantages, torch.rand(N, generator=g) / N


def away_from_edges(log_ratio, *edges):
    """Rows whose branch fp32 and fp64 cannot disagree about."""
    ratio = log_ratio.double().exp()
    return torch.stack([(ratio - edge).abs() > 1e-6 for edge in edges]).all(0)


@pytest.mark.parametrize("beta", [0.0, 0.07])
@pytest.mark.parametrize("delta", [0.0, 1.1, 3.0])
@pytest.mark.parametrize("kl", KL_ESTIMATORS)
@pytest.mark.parametrize("name", SURROGATES)
def test_against_autograd_of_the_formulas(name, kl, delta, beta):
    logps, log_ratio, ref_logps, advantages, weights = problem()
    actual = token_loss(
        *(logps, log_ratio, ref_logps, advantages, weights, name, kl, LOW, HIGH, delta, beta)
    )
    loss, dpolicy, dkl, _ = actual

    logp = logps.double().requires_grad_()
    old_logp = logps.double() - log_ratio.double()
    args = (advantages.double(), LOW, HIGH, delta)
    policy = weights.double() * SURROGATES[name].formula(logp, logp - old_logp, *args)
    penalty = weights.double() * beta * KL_ESTIMATORS[kl].formula(ref_logps.double() - logp)
    clear = away_from_edges(log_ratio, 1 - LOW, 1 + HIGH, *([delta] if delta else []))
    assert clear.float().mean() > 0.8
    expected_dpolicy = torch.autograd.grad(policy.sum(), logp)[0]
    expected_dkl = torch.autograd.grad(penalty.sum(), logp)[0]
    close = {"rtol": 2e-6, "atol": 1e-9}
    torch.testing.assert_close(loss.double(), (policy + penalty).detach(), **close)
    torch.testing.assert_close(dpolicy.double()[clear], expected_dpolicy[clear], **close)
    if beta:
        torch.testing.assert_close(dkl.double(), expected_dkl, **close)
    else:
        assert dkl is None
    assert (dpolicy[advantages == 0] == 0).all()


@pytest.mark.parametrize("name", SURROGATES)
def test_kernel_is_the_torch_twin_on_every_edge(name):
    """The same source on the same fp32 bits: they may differ by rounding, never by a branch."""
    logps, log_ratio, _, advantages, weights = problem()
    bounds = (LOW, HIGH, 3.0)
    loss, dpolicy, _, _ = token_loss(
        *(logps, log_ratio, None, advantages, weights, name, "k3", *bounds, 0.0)
    )
    value, derivative = torch_twin(SURROGATES[name].fn)(logps, log_ratio, advantages, *bounds)
    torch.testing.assert_close(loss, weights * value, rtol=1e-6, atol=0)
    torch.testing.assert_close(dpolicy, weights * derivative, rtol=1e-6, atol=0)


@pytest.mark.parametrize("with_ref", [False, True])
def test_stats_are_sums_over_rows(with_ref):
    logps, log_ratio, ref_logps, advantages, weights = problem()
    clear = away_from_edges(log_ratio, 1 - LOW, 1 + HIGH)
    rows = [x[clear] for x in (logps, log_ratio, ref_logps, advantages, weights)]
    logps, log_ratio, ref_logps, advantages, weights = rows
    ref = ref_logps if with_ref else None
    args = (logps, log_ratio, ref, advantages, weights, "ppo_clip", "k3", LOW, HIGH, 0.0, 0.0)
    stats = token_loss(*args)[3]
    x, r = (ref_logps - logps).double(), log_ratio.double().exp()
    expected = {
        "kl": (torch.expm1(x) - x).sum() if with_ref else torch.zeros((), dtype=torch.float64),
        "ratio": r.sum(),
        "clip_low": ((r < 1 - LOW) & (advantages < 0)).sum(),
        "clip_high": ((r > 1 + HIGH) & (advantages > 0)).sum(),
        "approx_kl": (torch.expm1(log_ratio.double()) - log_ratio).sum(),
    }
    assert tuple(expected) == STATS and expected["clip_low"] > 0 and expected["clip_high"] > 0
    for name, value, reference in zip(STATS, stats, expected.values(), strict=True):
        torch.testing.assert_close(value.double(), reference.double(), rtol=1e-5, atol=0, msg=name)
    assert torch.equal(stats, token_loss(*args)[3])


@pytest.mark.parametrize("n", [0, 1, 129])
def test_row_counts(n):
    rows = [x[:n].clone() for x in problem()]
    loss, dpolicy, dkl, stats = token_loss(*rows, "ppo_clip", "k3", LOW, HIGH, 0.0, 0.1)
    assert loss.shape == dpolicy.shape == dkl.shape == (n,) and stats.shape == (len(STATS),)
    assert loss.isfinite().all() and stats.isfinite().all()
    assert abs(stats[1] - rows[1].exp().sum()) < 1e-3


def test_overflow_is_finite_and_costs_nothing_without_advantage():
    log_ratio = torch.tensor([100.0, 100.0, 100.0, 1e30])
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0])
    logps, weights = torch.full((4,), -1.0), torch.full((4,), 0.25)
    loss, dpolicy, dkl, stats = token_loss(
        *(logps, log_ratio, logps + 200, advantages, weights, "ppo_clip", "k3"),
        *(LOW, HIGH, 0.0, 1e-3),
    )
    for x in (loss, dpolicy, dkl, stats):
        assert x.isfinite().all()
    assert dpolicy[0] == 0 and dpolicy[1] > 1e33 and (dpolicy[2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_segment_mean(dtype):
    """Segments of one, of several blocks, of exactly one block, and empty ones anywhere."""
    lengths = torch.tensor([0, 1, 70, 0, 0, 32, 5, 0])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(dtype)
    x = 3 + torch.randn(108, generator=torch.Generator().manual_seed(0))
    expected = torch.cat(
        [part.double().mean().expand(len(part)) for part in x.split(lengths.tolist()) if len(part)]
    )
    torch.testing.assert_close(segment_mean(x, cu_seqlens).double(), expected, rtol=1e-6, atol=0)


def test_segment_mean_of_nothing():
    assert segment_mean(torch.empty(0), torch.zeros(1, dtype=torch.int32)).shape == (0,)
    assert segment_mean(torch.empty(0), torch.zeros(4, dtype=torch.int32)).shape == (0,)
