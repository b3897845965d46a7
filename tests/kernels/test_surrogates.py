"""Each variant's hand-written value and derivative against autograd of its formula, in fp64."""

from __future__ import annotations

import pytest
import torch

from fastgrpo_kernels.surrogates import KL_ESTIMATORS, SURROGATES, torch_twin

EPSILON_LOW, EPSILON_HIGH = 0.2, 0.28
# Around both clip edges, around each delta, at ratio 1, and far away on both sides.
EDGES = torch.tensor([1 - EPSILON_LOW, 1 + EPSILON_HIGH, 1.1, 1.28, 3.0, 1.0], dtype=torch.float64)
RATIOS = torch.cat(
    [EDGES * (1 + s) for s in (-1e-9, 1e-9, -0.05, 0.05)] + [torch.logspace(-6, 6, 25)]
)


def _arguments(advantage):
    """Log-probs with gradient, old log-probs and advantages; every ratio of RATIOS."""
    logp = -torch.rand(RATIOS.numel(), dtype=torch.float64, generator=_generator()) - 0.1
    return logp.requires_grad_(), logp.detach() - RATIOS.log(), torch.full_like(logp, advantage)


def _generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("advantage", [1.7, -0.6, 0.0])
# None; equal to the upper clip edge; below it (TRL permits it); above it, as in the paper.
@pytest.mark.parametrize("delta", [0.0, 1 + EPSILON_HIGH, 1.1, 3.0])
@pytest.mark.parametrize("name", SURROGATES)
def test_surrogate_is_its_formula_and_derivative(name, delta, advantage):
    logp, old_logp, advantages = _arguments(advantage)
    bounds = (EPSILON_LOW, EPSILON_HIGH, delta)
    loss = SURROGATES[name].formula(logp, logp - old_logp, advantages, *bounds)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    value, derivative = torch_twin(SURROGATES[name].fn)(
        logp.detach(), logp.detach() - old_logp, advantages, *bounds
    )
    torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(derivative, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("advantage, edge", [(1.0, 1 + EPSILON_HIGH), (-1.0, 1 - EPSILON_LOW)])
def test_ppo_clip_keeps_the_gradient_on_the_edge_itself(advantage, edge):
    """Kept where the clipped value equals the ratio, lost one step outside."""
    step = 1e-6 if advantage > 0 else -1e-6
    # The bounds are those of the ratio that exp(log(edge)) gives, so that they are equal in bits.
    log_ratio = torch.tensor(edge, dtype=torch.float64).log()
    ratio = log_ratio.exp().item()
    bounds = (1 - ratio, ratio - 1, 0.0)
    twin = torch_twin(SURROGATES["ppo_clip"].fn)
    logp, advantages = torch.zeros((), dtype=torch.float64), torch.tensor(advantage).double()
    _, on_edge = twin(logp, log_ratio, advantages, *bounds)
    _, outside = twin(logp, log_ratio + step, advantages, *bounds)
    assert on_edge == -ratio * advantage
    assert outside == 0


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_surrogate_overflow(name, dtype):
    """A ratio that overflows stays finite, and costs nothing where the advantage is 0."""
    log_ratio = torch.tensor([100.0, 100.0, 100.0, -200.0, 1e30, float("inf")], dtype=dtype)
    advantage = torch.tensor([1.0, -1.0, 0.0, -1.0, 0.0, 0.0], dtype=dtype)
    value, derivative = torch_twin(SURROGATES[name].fn)(
        torch.full_like(log_ratio, -1.0), log_ratio, advantage, EPSILON_LOW, EPSILON_HIGH, 0.0
    )
    assert value.isfinite().all() and derivative.isfinite().all()
    assert (value[advantage == 0] == 0).all() and (derivative[advantage == 0] == 0).all()
    if name == "ppo_clip":
        assert derivative[0] == 0  # clipped above
        assert derivative[1] > 1e34  # not clipped above: saturates at exp(80)


def test_cispo_bounds_are_offsets_from_one_and_every_token_keeps_its_gradient():
    log_ratio = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64).log()
    _, derivative = torch_twin(SURROGATES["cispo"].fn)(
        torch.full_like(log_ratio, -1.0), log_ratio, torch.ones_like(log_ratio), 0.2, 0.28, 0.0
    )
    expected = torch.tensor([-0.8, -1.0, -1.28], dtype=torch.float64)
    torch.testing.assert_close(derivative, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_is_its_formula_and_derivative(name):
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    x = torch.cat([x, torch.tensor([-0.25, 0.25, 1e-3, -1e-3, 0.0])])
    logp = torch.zeros_like(x, requires_grad=True)
    expected = KL_ESTIMATORS[name].formula(x - logp)
    (gradient,) = torch.autograd.grad(expected.sum(), logp)
    value, derivative = torch_twin(KL_ESTIMATORS[name].fn)(x)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(derivative, gradient, rtol=1e-10, atol=1e-11)


def test_k3_keeps_its_digits_near_zero():
    """In fp32 exp(x) - x - 1 would have none left at x = 1e-4."""
    x = torch.tensor([1e-4, -1e-4, 3e-3, -0.02, 0.2])
    exact = x.double()
    value, derivative = torch_twin(KL_ESTIMATORS["k3"].fn)(x)
    expected = exact**2 * (1 / 2 + exact / 6 + exact**2 / 24 + exact**3 / 120 + exact**4 / 720)
    torch.testing.assert_close(value.double(), expected, rtol=3e-6, atol=0)
    torch.testing.assert_close(derivative.double(), -torch.expm1(exact), rtol=3e-7, atol=0)


def test_k3_overflow_is_finite_and_points_to_the_reference():
    value, derivative = torch_twin(KL_ESTIMATORS["k3"].fn)(torch.tensor([100.0, float("inf")]))
    assert value.isfinite().all() and (derivative < -1e34).all() and derivative.isfinite().all()
