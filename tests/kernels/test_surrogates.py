"""Each variant's hand-written value and derivative against autograd of its formula, in fp64."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from fastgrpo.objective.derivative_check import check_derivative
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS, KL_GRADIENTS
from fastgrpo_kernels.surrogates import SURROGATES
from fastgrpo_kernels.twins import torch_twin

LOW, HIGH = 0.2, 0.28
PARAMETERS = {
    "epsilon_low": LOW, "epsilon_high": HIGH, "delta": 3.0, "proximal_coef": 0.3,
    "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "kl_cov_coef": 0.1,
}  # fmt: skip
# Around both clip edges, around each delta, at ratio 1, and far away on both sides.
EDGES = torch.tensor([1 - LOW, 1 + HIGH, 1.1, 1.28, 3.0, 1.0], dtype=torch.float64)
NEAR = [EDGES * (1 + s) for s in (-1e-9, 1e-9, -0.05, 0.05)]
RATIOS = torch.cat([*NEAR, torch.logspace(-6, 6, 25, dtype=torch.float64)])
# None; equal to the upper clip edge; below it (TRL permits it); above it, as in the paper.
DELTAS = (math.inf, 1 + HIGH, 1.1, 3.0)
CASES = [
    (name, delta)
    for name, surrogate in SURROGATES.items()
    for delta in (DELTAS if "delta" in surrogate.parameters else (None,))
]


def parameters(name, **changed):
    return [{**PARAMETERS, **changed}[key] for key in SURROGATES[name].parameters]


def evaluate(name, logp, log_ratio, advantage, *, context=None, **changed):
    """What the source computes on tensors."""
    context = torch.zeros_like(logp) if context is None else context
    fn = torch_twin(SURROGATES[name].fn)
    return fn(logp, log_ratio, advantage, context, *parameters(name, **changed))


@pytest.mark.parametrize("advantage", [1.7, -0.6, 0.0])
@pytest.mark.parametrize("name, delta", CASES)
def test_surrogate_is_its_formula_and_derivative(name, delta, advantage):
    generator = torch.Generator().manual_seed(0)
    # Probabilities below 1 on both sides of the ratio.
    logp = -torch.rand(RATIOS.numel(), dtype=torch.float64, generator=generator) - 0.1
    logp = torch.minimum(logp, RATIOS.log() - 0.01)
    context = torch.rand(logp.shape, dtype=torch.float64, generator=generator).round()
    log_ratio, moving = RATIOS.log().requires_grad_(), logp.clone().requires_grad_()
    advantages = torch.full_like(logp, advantage)
    loss = SURROGATES[name].formula(
        moving, log_ratio, advantages, context, *parameters(name, delta=delta)
    )
    by_logp, by_ratio = torch.autograd.grad(
        loss.sum(), (moving, log_ratio), allow_unused=True, materialize_grads=True
    )
    value, slope, _ = evaluate(
        name, logp, log_ratio.detach(), advantages, context=context, delta=delta
    )
    torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=1e-12)
    # At a token the log-ratio moves with logp; where the slope is of the ratio, logp adds nothing.
    if SURROGATES[name].slope == "ratio":
        assert by_logp.eq(0).all()
    # Far above 1 autograd's 1 - sigmoid of SAPO's gate has no digit left to compare with.
    exact = RATIOS <= 10 if name == "sapo" else RATIOS > 0
    torch.testing.assert_close(slope[exact], (by_logp + by_ratio)[exact], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SURROGATES)
def test_what_registration_checks_holds_for_the_losses_of_the_package(name):
    """Their kinks and constants are no false alarms."""
    own = {key: PARAMETERS[key] for key in SURROGATES[name].parameters}
    entry = SURROGATES[name]._replace(parameters=own, options=())
    if name != "dro":
        return check_derivative(entry)
    # Part of its gradient passes through the ratio and part of it does not: `rules` refuses the
    # clamp that would have to tell them apart, which no rule does for a loss from outside.
    with pytest.raises(ValueError, match="formula: expected all of its gradient with respect to"):
        check_derivative(entry)


@pytest.mark.parametrize("name", SURROGATES)
def test_registration_finds_a_wrong_slope(name):
    """One that is off by one part in 1e5."""
    entry = SURROGATES[name]
    own = {key: PARAMETERS[key] for key in entry.parameters}
    twin = torch_twin(entry.fn)

    def wrong(*arguments):
        loss, slope, clipped = twin(*arguments)
        return loss, slope * (1 + 1e-5), clipped

    with (
        mock.patch("fastgrpo.objective.derivative_check.torch_twin", lambda fn: wrong),
        pytest.raises(ValueError, match="expected the slope dL/d|formula: expected all of"),
    ):
        check_derivative(entry._replace(parameters=own))


@pytest.mark.parametrize("advantage, edge", [(1.0, 1 + HIGH), (-1.0, 1 - LOW)])
def test_ppo_clip_keeps_the_gradient_on_the_edge_itself(advantage, edge):
    """Kept where the clipped value equals the ratio, lost one step outside."""
    step = 1e-6 if advantage > 0 else -1e-6
    # The bounds are those of the ratio that exp(log(edge)) gives, so that they are equal in bits.
    log_ratio = torch.tensor(edge, dtype=torch.float64).log()
    ratio = log_ratio.exp().item()
    bounds = {"epsilon_low": 1 - ratio, "epsilon_high": ratio - 1, "delta": math.inf}
    logp, advantages = torch.zeros((), dtype=torch.float64), torch.tensor(advantage).double()
    _, on_edge, _ = evaluate("ppo_clip", logp, log_ratio, advantages, **bounds)
    _, outside, side = evaluate("ppo_clip", logp, log_ratio + step, advantages, **bounds)
    assert on_edge == -ratio * advantage
    assert outside == 0 and side == advantage


@pytest.mark.parametrize("name", [n for n, s in SURROGATES.items() if s.inert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_surrogate_overflow(name, dtype):
    """A ratio that overflows stays finite, and costs nothing where the advantage is 0."""
    log_ratio = torch.tensor([100.0, 100.0, 100.0, -200.0, 1e30, math.inf], dtype=dtype)
    advantage = torch.tensor([1.0, -1.0, 0.0, -1.0, 0.0, 0.0], dtype=dtype)
    logp = torch.full_like(log_ratio, -1.0)
    value, slope, _ = evaluate(name, logp, log_ratio, advantage, delta=math.inf)
    assert value.isfinite().all() and slope.isfinite().all()
    assert (value[advantage == 0] == 0).all() and (slope[advantage == 0] == 0).all()
    if name == "ppo_clip":
        assert slope[0] == 0  # clipped above
        assert slope[1] > 1e34  # not clipped above: saturates at exp(80)


def test_cispo_bounds_are_offsets_from_one_and_every_token_keeps_its_gradient():
    log_ratio = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64).log()
    logp, advantage = torch.full_like(log_ratio, -1.0), torch.ones_like(log_ratio)
    _, slope, side = evaluate("cispo", logp, log_ratio, advantage)
    expected = torch.tensor([-0.8, -1.0, -1.28], dtype=torch.float64)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0)
    assert side.tolist() == [-1, 0, 1]
    # The raw convention bounds the ratio itself, above only.
    _, slope, side = evaluate("cispo_raw", logp, log_ratio, advantage, epsilon_high=2.0)
    torch.testing.assert_close(slope, -torch.tensor([0.1, 1.0, 2.0]).double())
    assert side.tolist() == [0, 0, 1]


def test_zero_advantages_take_the_branch_of_their_source():
    """The sign test is A > 0 in SAPO, DPPO, TOPR, A >= 0 in VESPO."""
    zero = torch.zeros(1, dtype=torch.float64)
    # Only a token's mask shows it: its weight times 0 is 0. Both bounds of DPPO are exceeded.
    _, _, up = evaluate("dppo_tv", zero - 1, zero + 0.9, zero)
    _, _, down = evaluate("dppo_tv", zero - 1, zero - 0.9, zero)
    assert (up, down) == (0, -1)
    _, _, tapered = evaluate("topr", zero - 1, zero + 0.9, zero)
    assert tapered == 1


@pytest.mark.parametrize("gradient", KL_GRADIENTS)
@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_is_its_formula_and_derivative(name, gradient):
    x = torch.linspace(-12, 12, 2000, dtype=torch.float64)
    x = torch.cat([x, torch.tensor([-0.25, 0.25, 1e-3, -1e-3, 0.0])])
    logp, log_ratio = torch.zeros_like(x).requires_grad_(), (x / 24).clone().requires_grad_()
    value, slope = torch_twin(KL_ESTIMATORS[name].fn)(x)
    estimate = KL_ESTIMATORS[name].formula(x - logp)
    expected = KL_GRADIENTS[gradient].formula(x - logp, logp, estimate, log_ratio.exp())
    by_logp, by_ratio = torch.autograd.grad(
        expected.sum(), (logp, log_ratio), allow_unused=True, materialize_grads=True
    )
    actual = torch_twin(KL_GRADIENTS[gradient].fn)(x, value, slope, log_ratio.detach().exp())
    for mine, wanted in zip(actual, (expected.detach(), by_logp, by_ratio), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-11)


def test_unbiased_gradients_are_that_of_k2_on_policy():
    """The score-corrected k3 and the importance-weighted one at ratio 1: logp - ref_logp."""
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    value, slope = torch_twin(KL_ESTIMATORS["k3"].fn)(x)
    for gradient in ("score_function", "importance", "straight_through"):
        fn = torch_twin(KL_GRADIENTS[gradient].fn)
        _, by_logp, by_ratio = fn(x, value, slope, torch.ones_like(x))
        torch.testing.assert_close(by_logp + by_ratio, -x)


def test_k3_keeps_its_digits_near_zero():
    """In fp32 exp(x) - x - 1 would have none left at x = 1e-4."""
    x = torch.tensor([1e-4, -1e-4, 3e-3, -0.02, 0.2])
    exact = x.double()
    value, slope = torch_twin(KL_ESTIMATORS["k3"].fn)(x)
    expected = exact**2 * (1 / 2 + exact / 6 + exact**2 / 24 + exact**3 / 120 + exact**4 / 720)
    torch.testing.assert_close(value.double(), expected, rtol=3e-6, atol=0)
    torch.testing.assert_close(slope.double(), -torch.expm1(exact), rtol=3e-7, atol=0)


def test_k3_overflow_is_finite_and_points_to_the_reference():
    value, slope = torch_twin(KL_ESTIMATORS["k3"].fn)(torch.tensor([100.0, math.inf]))
    assert value.isfinite().all() and (slope < -1e34).all() and slope.isfinite().all()
