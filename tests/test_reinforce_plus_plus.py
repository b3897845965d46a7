"""`reinforce_plus_plus`, one advantage per token, against plain Python."""

from __future__ import annotations

import math
from statistics import fmean, pstdev, stdev

import pytest
import torch

import fastgrpo

nan = math.nan


def oracle(rewards, mask, gamma, ddof):
    """Returns of each completion's unmasked tokens, whitened over those of all completions."""
    returns = []
    for row, kept in zip(rewards, mask, strict=True):
        values, running = [0.0] * len(row), 0.0
        for t in reversed(range(len(row))):
            if kept[t]:
                running = row[t] + gamma * running
                values[t] = running
        returns.append(values)
    scored = [
        not any(r != r for r, k in zip(row, kept, strict=True) if k)
        for row, kept in zip(rewards, mask, strict=True)
    ]
    counted = [[s and k for k in kept] for s, kept in zip(scored, mask, strict=True)]
    tokens = [
        v
        for row, kept in zip(returns, counted, strict=True)
        for v, k in zip(row, kept, strict=True)
        if k
    ]
    scale = math.sqrt((stdev(tokens) if ddof else pstdev(tokens)) ** 2 + 1e-8)
    return [
        [(v - fmean(tokens)) / scale if k else 0.0 for v, k in zip(row, kept, strict=True)]
        for row, kept in zip(returns, counted, strict=True)
    ]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 33])
def test_against_plain_python(length, ddof, gamma):
    generator = torch.Generator().manual_seed(length)
    rewards = torch.randn(5, length, generator=generator)
    mask = torch.rand(5, length, generator=generator) < 0.7
    mask[:2, 0], mask[4] = True, False  # at least two tokens; a completion without any
    rewards = rewards.masked_fill(~mask, nan)
    actual = fastgrpo.reinforce_plus_plus(rewards, mask, gamma=gamma, ddof=ddof)
    wanted = torch.tensor(oracle(rewards.tolist(), mask.tolist(), gamma, ddof))
    assert (actual - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert actual[~mask].eq(0).all()


def test_an_unscored_completion_is_left_out():
    rewards = torch.tensor([[0.0, 1.0], [0.0, nan], [0.5, 0.0]])
    mask = torch.ones(3, 2, dtype=torch.bool)
    actual = fastgrpo.reinforce_plus_plus(rewards, mask)
    assert torch.equal(actual[[0, 2]], fastgrpo.reinforce_plus_plus(rewards[[0, 2]], mask[:2]))
    assert actual[1].eq(0).all()


@pytest.mark.parametrize("value", [0.1, 1e6, nan])
def test_equal_returns_are_exactly_zero(value):
    rewards = torch.zeros(3, 5)
    rewards[:, -1] = value
    mask = torch.ones(3, 5, dtype=torch.bool)
    assert fastgrpo.reinforce_plus_plus(rewards, mask).eq(0).all()
    mask[:, :-1] = False
    assert fastgrpo.reinforce_plus_plus(rewards, mask, gamma=0.5).eq(0).all()


def test_a_large_mean_does_not_cost_the_digits_of_the_spread():
    last = torch.tensor([1, 5, 6, 7])
    shifted = fastgrpo.reinforce_plus_plus(
        4096 + last[:, None] / 2048, torch.ones(4, 1, dtype=torch.bool)
    )
    exact = (last - last.double().mean()) / (last.double().var() + 1e-8 * 2048**2).sqrt()
    assert (shifted[:, 0] - exact).abs().max() < 1e-5


def test_nothing_to_whiten():
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert fastgrpo.reinforce_plus_plus(torch.full((2, 3), nan), none).eq(0).all()
    for shape in ((0, 3), (3, 0)):
        empty = torch.empty(shape)
        assert fastgrpo.reinforce_plus_plus(empty, empty.bool()).shape == shape


def test_the_rewards_are_left_as_they_were():
    rewards = torch.randn(2, 5, requires_grad=True)
    before = rewards.detach().clone()
    result = fastgrpo.reinforce_plus_plus(rewards, torch.ones(2, 5).bool(), gamma=0.9)
    assert not result.requires_grad and torch.equal(rewards.detach(), before)


ONES = torch.ones(2, 3)
BAD = {
    "token_rewards: expected shape": (torch.ones(6), ONES.bool(), {}),
    "token_rewards: expected dtype": (ONES.double(), ONES.bool(), {}),
    "token_rewards: expected finite": (ONES * math.inf, ONES.bool(), {}),
    "completion_mask: expected shape": (ONES, ONES.bool()[:1], {}),
    "completion_mask: expected dtype": (ONES, ONES, {}),
    "gamma: expected a number in": (ONES, ONES.bool(), {"gamma": 1.5}),
    "ddof: expected": (ONES, ONES.bool(), {"ddof": 2}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    rewards, mask, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        fastgrpo.reinforce_plus_plus(rewards, mask, **options)
