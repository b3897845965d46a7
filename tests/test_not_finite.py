"""Unmasked NaN and inf show in the loss and the gradients; a logit of -inf is an absent column."""

from __future__ import annotations

import math

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig
from fastgrpo.objective.presets import PRESETS

B, T, H, V = 2, 3, 4, 7


def problem():
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, T, H), torch.randn(V, H)
    ids, mask = torch.randint(0, V, (B, T)), torch.ones(B, T, dtype=torch.bool)
    logps = fastgrpo.linear_logps(hidden, weight, ids).logps
    old, ref = (logps - 0.1 * torch.rand(B, T) for _ in range(2))
    given = dict(old_logps=old, ref_logps=ref, sampler_logps=old - 0.01 * torch.rand(B, T))
    return [hidden, weight, ids, mask, torch.tensor([1.0, -1.0])], given


def nan_in_hidden(arguments, given):
    arguments[0][0, 1, 2] = math.nan


def nan_where_the_advantage_is_zero(arguments, given):
    arguments[0][0, 1, 2] = math.nan
    arguments[4][0] = 0.0


def nan_in_advantages(arguments, given):
    arguments[4][0] = math.nan


def nan_in_old_logps(arguments, given):
    given["old_logps"][0, 1] = math.nan


def infinite_old_logp(arguments, given):
    given["old_logps"][0, 1] = -math.inf


def nan_in_ref_logps(arguments, given):
    given["ref_logps"][0, 1] = math.nan


def infinite_sampler_logp(arguments, given):
    given["sampler_logps"][0, 1] = -math.inf


def reads(config, name):
    """Whether the loss, and not only a metric, depends on these log-probs."""
    if name == "old_logps":
        ratio = config.ratio_level != "none" and config.anchor == "old"
        return ratio or config.needs_sampler
    return bool(config.beta) if name == "ref_logps" else config.needs_sampler


SPOILED = {
    nan_in_hidden: None,
    nan_where_the_advantage_is_zero: None,
    nan_in_advantages: None,
    nan_in_old_logps: "old_logps",
    infinite_old_logp: "old_logps",
    nan_in_ref_logps: "ref_logps",
    infinite_sampler_logp: "sampler_logps",
}


def finite(arguments, given, config):
    """Whether the loss, the gradient of hidden and that of weight are finite."""
    hidden, weight = (x.detach().requires_grad_() for x in arguments[:2])
    out = fastgrpo.grpo_loss(hidden, weight, *arguments[2:], **given, config=config)
    out.loss.backward()
    return [bool(x.isfinite().all()) for x in (out.loss, hidden.grad, weight.grad)]


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("preset", PRESETS)
def test_it_shows_in_the_loss_and_in_both_gradients(preset, spoil):
    length = {"max_completion_length": T} if preset == "dr_grpo" else {}
    config, name = LossConfig.preset(preset, **length), SPOILED[spoil]
    for off_policy in (True, False):
        arguments, given = problem()
        if not off_policy:
            given["old_logps"] = None
        if name is not None and (given[name] is None or not reads(config, name)):
            continue
        assert finite(arguments, given, config) == [True] * 3
        spoil(arguments, given)
        assert finite(arguments, given, config) == [False] * 3


@pytest.mark.parametrize("rejection", ["token_k1", "seq_mean_k3"])
def test_no_rejection_drops_it_in_silence(rejection):
    config = LossConfig(rejection=rejection, rejection_max=2.0)
    arguments, given = problem()
    nan_in_hidden(arguments, given)
    assert finite(arguments, given, config) == [False] * 3


def test_a_sampler_without_a_log_prob_is_no_fault():
    config = LossConfig(correction="token_tis")
    arguments, given = problem()
    given["sampler_logps"][0, 1] = math.nan
    assert finite(arguments, given, config) == [True] * 3


def test_masked_tokens_may_hold_anything():
    for preset in PRESETS:
        length = {"max_completion_length": T} if preset == "dr_grpo" else {}
        arguments, given = problem()
        arguments[3][0, 1] = False
        for x in (arguments[0], *given.values()):
            x[0, 1] = math.nan
        assert finite(arguments, given, LossConfig.preset(preset, **length)) == [True] * 3, preset


def test_approx_kl_shows_it_too():
    arguments, given = problem()
    nan_in_hidden(arguments, given)
    assert fastgrpo.grpo_loss(*arguments, **given).metrics["approx_kl"].isnan()


# ---- whole slices of -inf ----------------------------------------------------------------------

ROUTES = {
    "one pass": {},
    "entropy bonus": {"config": LossConfig(entropy_coef=0.1)},
    "two phases": {"config": "gspo"},
    "differentiable entropy": {"config": LossConfig(entropy="differentiable")},
    "several chunks": {"workspace_mb": 0.4},
    "sparse, everything kept": {"sparsity": 1e-6, "seed": 0},
}


@pytest.mark.parametrize("level, temperature", [(-100.0, 1.0), (0.0, 0.1)])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_columns_of_minus_infinity_do_not_exist(route, frozen, level, temperature):
    """40,000 columns, more than one slice, of which the last 8 are finite."""
    torch.manual_seed(0)
    wide, few = 40_000, 8
    hidden, weight = torch.randn(B, T, H), torch.randn(wide, H)
    bias = torch.full((wide,), -torch.inf)
    bias[-few:] = level
    ids, mask = torch.randint(few, (B, T)), torch.ones(B, T, dtype=torch.bool)
    advantages, old = torch.tensor([1.0, -1.0]), -3 * torch.rand(B, T)
    results = []
    for w, b, shift in ((weight, bias, wide - few), (weight[-few:], bias[-few:], 0)):
        h, w = hidden.clone().requires_grad_(), w.clone().requires_grad_(not frozen)
        out = fastgrpo.grpo_loss(
            h, w, ids + shift, mask, advantages, old_logps=old, bias=b, temperature=temperature,
            **route,
        )  # fmt: skip
        out.loss.backward()
        grads = [h.grad] if frozen else [h.grad, w.grad[-few:]]
        results.append([out.loss.detach(), out.logps, *grads])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_the_mean_of_many_large_ratios_is_finite():
    """A ratio of e^80 is finite, and so is the mean of 20,000. Their sum in fp32 is not."""
    n = 20_000
    hidden, weight = torch.zeros(1, n, 2), torch.zeros(3, 2)
    ids, mask = torch.zeros(1, n, dtype=torch.int64), torch.ones(1, n, dtype=torch.bool)
    config = LossConfig(ratio_level="sequence_sum", aggregation="sequence_sum")
    out = fastgrpo.grpo_loss(
        hidden, weight, ids, mask, torch.zeros(1), old_logps=torch.full((1, n), -5.0),
        config=config,
    )  # fmt: skip
    assert out.metrics["ratio_mean"].dtype == torch.float32
    assert out.metrics["ratio_mean"].item() == pytest.approx(math.exp(80), rel=1e-5)
    assert out.metrics["ratio_max"].isfinite()
