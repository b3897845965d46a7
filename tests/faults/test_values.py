"""Rows 15 to 18, 20 and 41 of the fault matrix: numbers at the ends of their range, and beyond."""

from __future__ import annotations

import math

import pytest
import torch

from fastgrpo import LossConfig
from fastgrpo.testing import make_batch, relative_error
from loss_routes import LOG_PROBS, LOSSES, assert_same, exact, routes, run

SMALL = dict(sequences=3, length=4, hidden_size=16)
BAD = (0, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@routes()
def test_row_15_a_bad_hidden_state_stays_in_its_row(backend, route, bad):
    """It shows in the loss and the weight's gradient, and in no other row."""
    batch = make_batch(**SMALL)
    clean = run(route, batch, backend=backend)
    batch.hidden[BAD][2] = bad
    out = run(route, batch, backend=backend)
    others = torch.ones_like(batch.completion_mask)
    others[BAD] = False
    assert out.logps[BAD].isnan() and out.value.isnan()
    torch.testing.assert_close(out.logps[others], clean.logps[others])
    assert not out.dweight.isfinite().all() and not out.dhidden.isfinite().all()
    if route in LOG_PROBS:
        assert out.dhidden[BAD].isnan().any()
        torch.testing.assert_close(out.dhidden[others], clean.dhidden[others])


@routes(of=LOG_PROBS)
def test_row_15_a_bad_row_that_is_left_out(backend, route):
    """Of log-probs, by a factor of 0: it does not reach any gradient."""
    batch = make_batch(**SMALL)
    per_token = torch.ones_like(batch.old_logps)
    per_token[BAD] = 0.0
    batch = batch._replace(advantages=per_token)
    clean = run(route, batch, backend=backend)
    batch.hidden[BAD][2] = math.nan
    out = run(route, batch, backend=backend)
    assert out.logps[BAD].isnan() and (out.dhidden[BAD] == 0).all()
    assert_same(out._replace(value=clean.value, logps=clean.logps), clean)


@routes(without=("support", "sparse", "frozen"))
def test_row_16_logits_of_minus_infinity(backend, route):
    """A masked vocabulary is a smaller one."""
    batch = make_batch(**SMALL)
    few = int(batch.completion_ids.max()) + 1
    small = batch._replace(weight=batch.weight[:few])
    assert few < len(batch.weight)
    bias = torch.zeros(len(batch.weight))
    bias[few:] = -math.inf
    out = run(route, batch, backend=backend, bias=bias)
    wanted = run(route, small, backend=backend, bias=bias[:few])
    assert (out.dweight[few:] == 0).all()
    assert_same(out._replace(dweight=out.dweight[:few]), wanted)


@pytest.mark.parametrize("level", [1e4, -1e4])
@routes()
def test_row_17_all_logits_far_from_zero(backend, route, level):
    """fp32 holds 1e4 to 1e-3: the log-probs are those of the rounded logits."""
    batch = make_batch(**SMALL)
    bias = torch.full((len(batch.weight),), level)
    out, wanted = run(route, batch, backend=backend, bias=bias), exact(route, batch, bias=bias)
    assert (out.logps - wanted.logps).abs().max() <= 4e-3
    if "sparse" not in route:
        for x, y in ((out.dhidden, wanted.dhidden), (out.dweight, wanted.dweight)):
            assert relative_error(x, y) <= 4e-3


@pytest.mark.parametrize("gap", [80.0, 2000.0])
@routes()
def test_row_18_a_target_without_a_chance(backend, route, gap):
    """exp of its log-prob is 0 in fp32; the log-prob is not."""
    batch = make_batch(**SMALL)
    target = batch.completion_ids[BAD].item()
    batch = batch._replace(old_logps=batch.old_logps.clone())
    chosen = batch.completion_ids == target
    bias = torch.zeros(len(batch.weight))
    bias[target] = -gap
    batch.old_logps[chosen] -= gap
    out, wanted = run(route, batch, backend=backend, bias=bias), exact(route, batch, bias=bias)
    alone = "support" in route and wanted.logps[BAD] == 0
    assert alone or out.logps[BAD] < 20 - gap
    torch.testing.assert_close(out.logps.double(), wanted.logps, rtol=1e-6, atol=2e-5)
    if "sparse" not in route:
        assert relative_error(out.dhidden, wanted.dhidden) <= (2e-3 if "fp16" in route else 1e-4)


@routes(of=LOSSES, without=("differentiable",))
def test_row_20_a_log_prob_that_the_sampler_has_not(backend, route):
    """NaN in sampler_logps, from an engine, is a weight of 1; in old_logps, our own, a fault."""
    batch = make_batch(**SMALL)
    config = LossConfig(correction="token_tis", correction_max=1.5)
    sampler = batch.old_logps - 0.1
    sampler[BAD] = batch.old_logps[BAD]
    same = run(route, batch, backend=backend, config=config, sampler_logps=sampler)
    sampler = sampler.clone()
    sampler[BAD] = math.nan
    assert_same(run(route, batch, backend=backend, config=config, sampler_logps=sampler), same)
    batch.old_logps[BAD] = math.nan
    assert run(route, batch, backend=backend).value.isnan()


@routes()
def test_row_41_a_temperature_for_each_token(backend, route):
    batch = make_batch(**SMALL, logit_std=1.0)
    temperature = 0.5 + torch.rand(3, 4, generator=torch.Generator().manual_seed(4))
    temperature[~batch.completion_mask] = math.nan
    out = run(route, batch, backend=backend, temperature=temperature)
    wanted = exact(route, batch, temperature=temperature)
    if "sparse" in route:
        wanted = wanted._replace(dhidden=out.dhidden, dweight=out.dweight)
    assert_same(out, wanted)
