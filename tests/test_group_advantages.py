"""`group_advantages` and `count_normalizer` against plain Python."""

from __future__ import annotations

import math

import pytest
import torch

import fastgrpo
from fastgrpo import reference

nan = math.nan
GROUPS = {
    "pairs": ([1.0, 0.0, 2.0, 5.0], [0, 0, 1, 1]),
    "any order, any size": ([1.0, 0.5, 2.0, 3.0, -1.0, 4.0, 0.0], [7, -3, 7, 7, -3, 9, 9]),
    "unscored": ([1.0, nan, 2.0, nan, nan, 3.0], [0, 0, 0, 1, 1, 1]),
    "one scored member": ([1.0, nan, nan, 2.0], [0, 0, 0, 1]),
    "nearly constant": ([0.1, 0.1, 0.1 + 1e-7, 0.1], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo"])
@pytest.mark.parametrize(("rewards", "ids"), GROUPS.values(), ids=GROUPS)
def test_groups_by_id(rewards, ids, estimator):
    actual = fastgrpo.group_advantages(
        torch.tensor(rewards), torch.tensor(ids), estimator=estimator
    )
    rewards = torch.tensor(rewards).tolist()
    wanted = reference.group_advantages(rewards, ids, estimator == "grpo")
    assert torch.allclose(actual, torch.tensor(wanted), atol=1e-5)


def test_fixed_groups_equal_groups_by_id():
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(3).repeat_interleave(4)
    assert torch.equal(
        fastgrpo.group_advantages(rewards, 4), fastgrpo.group_advantages(rewards, ids)
    )


def test_ddof_and_eps():
    actual = fastgrpo.group_advantages(torch.tensor([0.0, 1.0]), 2, ddof=0, eps=0.5)
    assert torch.allclose(actual, torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize("value", [0.1, 0.7, 1e6, nan])
@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo"])
def test_groups_without_contrast_are_exactly_zero(value, size, estimator):
    advantages = fastgrpo.group_advantages(torch.full((6,), value), size, estimator=estimator)
    assert advantages.eq(0).all()


def test_no_completions():
    assert fastgrpo.group_advantages(torch.empty(0), 4).shape == (0,)
    ids = torch.empty(0, dtype=torch.int64)
    assert fastgrpo.group_advantages(torch.empty(0), ids).shape == (0,)


BAD = {
    "rewards: expected dtype": (torch.ones(4, dtype=torch.float64), 2, {}),
    "rewards: expected shape": (torch.ones(2, 2), 2, {}),
    "divisor of the 4 rewards": (torch.ones(4), 3, {}),
    "group_ids_or_size: expected shape": (torch.ones(4), torch.zeros(3, dtype=torch.int64), {}),
    "group_ids_or_size: expected dtype": (torch.ones(4), torch.zeros(4), {}),
    "estimator: expected": (torch.ones(4), 2, {"estimator": "zscore"}),
    "ddof: expected": (torch.ones(4), 2, {"ddof": 2}),
    "eps: expected": (torch.ones(4), 2, {"eps": -1.0}),
    "no effect with estimator='dr_grpo'": (torch.ones(4), 2, {"estimator": "dr_grpo", "ddof": 0}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    rewards, groups, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        fastgrpo.group_advantages(rewards, groups, **options)


def test_count_normalizer():
    masks = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), torch.tensor([[1, 1, 1]]).bool()
    assert fastgrpo.count_normalizer(masks, "dapo") == 6
    assert fastgrpo.count_normalizer(masks[0], "dapo") == 3
    assert fastgrpo.count_normalizer(masks, "grpo") == 3
    config = fastgrpo.LossConfig.preset("dr_grpo", max_completion_length=5)
    assert fastgrpo.count_normalizer(masks, config) == 15
    with pytest.raises(ValueError, match="max_completion_length"):
        fastgrpo.count_normalizer(masks, "dr_grpo")
    with pytest.raises(ValueError, match="at least one mask"):
        fastgrpo.count_normalizer([])
