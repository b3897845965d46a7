"""Shaping of rewards before they become advantages, against plain Python and against TRL."""

from __future__ import annotations

import math

import pytest
import torch

import fastgrpo

nan = math.nan
FORMULAS = {
    "k1": lambda logp, ref: logp - ref,
    "k2": lambda logp, ref: (logp - ref) ** 2 / 2,
    "k3": lambda logp, ref: math.expm1(ref - logp) - (ref - logp),
    "abs": lambda logp, ref: abs(logp - ref),
}
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()


@pytest.fixture
def logps():
    generator = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(2, 3, 4, generator=generator)
    logps[1, 0, 1] = logps[0, 0, 1] + 1e-3  # where exp(x) - x - 1 has lost its digits
    return logps.masked_fill(~MASK, nan)


@pytest.mark.parametrize("kl", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kl_penalty(logps, kl, dtype):
    logps = logps.to(dtype).requires_grad_()
    actual = fastgrpo.kl_penalty(*logps, MASK, kl=kl)
    assert actual.dtype == torch.float32 and not actual.requires_grad
    assert actual[~MASK].eq(0).all(), "whatever the masked tokens hold"
    for value, logp, ref in zip(actual[MASK], *(x[MASK].tolist() for x in logps), strict=True):
        wanted = FORMULAS[kl](logp, ref)
        # fp32 rounds the difference of the log-probs, which k2 and k3 square.
        assert abs(value - wanted) <= 1e-6 * abs(wanted) + 3e-7 * abs(logp - ref) + 1e-12


def test_kl_in_the_reward_of_a_completion(logps):
    """TRL's RLOO: reward - beta * sum over tokens of logp - ref_logp."""
    rewards = torch.tensor([1.0, nan, 0.5])
    actual = rewards - 0.05 * fastgrpo.kl_penalty(*logps, MASK).sum(1)
    wanted = 1.0 - 0.05 * sum((logps[0] - logps[1])[0][MASK[0]].tolist())
    assert abs(actual[0] - wanted) < 1e-6
    assert actual[1].isnan() and actual[2] == 0.5


def test_token_rewards():
    actual = fastgrpo.token_rewards(torch.tensor([3.0, nan, 5.0]), MASK)
    wanted = torch.tensor([[0.0, 0.0, 0.0, 3.0], [0.0, 0.0, nan, 0.0], [0.0] * 4])
    assert torch.equal(actual.nan_to_num(-1.0), wanted.nan_to_num(-1.0))


@pytest.mark.parametrize("groups", [3, torch.tensor([4, 2, 4, 2, 4, 2])], ids=["size", "ids"])
def test_length_penalty(groups):
    rewards, lengths = [1.0, 0.5, nan, 0.25, 0.75, 0.0], [10, 40, 99, 20, 0, 7]
    ids = [0, 0, 0, 1, 1, 1] if isinstance(groups, int) else groups.tolist()
    actual = fastgrpo.length_penalty(
        torch.tensor(rewards), torch.tensor(lengths), groups, weight=0.5
    )
    for i, reward in enumerate(rewards):
        same = [j for j in range(6) if ids[j] == ids[i] and rewards[j] == rewards[j]]
        mean = sum(rewards[j] for j in same) / len(same)
        wanted = reward - 0.5 * mean * lengths[i] / max(lengths[j] for j in same)
        assert abs(actual[i] - wanted) < 1e-6 or reward != reward
        assert actual[i].isnan() == (reward != reward)


def test_length_penalty_without_lengths_or_scores_changes_nothing():
    rewards, none = torch.tensor([1.0, 0.5, nan, nan]), torch.zeros(4, dtype=torch.int64)
    actual = fastgrpo.length_penalty(rewards, none, 2)
    assert torch.equal(actual[:2], rewards[:2]) and actual[2:].isnan().all()


def test_soft_overlong_punishment():
    lengths = torch.arange(0, 140)
    actual = fastgrpo.soft_overlong_punishment(lengths, max_completion_length=120, cache_length=30)
    for length, value in enumerate(actual.tolist()):
        wanted = 0.0 if length <= 90 else -1.0 if length > 120 else (90 - length) / 30
        assert abs(value - wanted) < 1e-7
    for cache in (1, 120):
        options = {"max_completion_length": 120, "cache_length": cache}
        theirs = pytest.importorskip("trl.rewards").get_soft_overlong_punishment(120, cache)
        ours = fastgrpo.soft_overlong_punishment(lengths, **options)
        assert torch.allclose(ours, torch.tensor(theirs([[0] * n for n in range(140)])))


def test_mask_truncated_completions():
    ids = torch.tensor(
        [[5, 6, 2, 0], [5, 2, 6, 7], [2, 2, 2, 2], [5, 6, 7, 3], [2, 5, 6, 0]],
    )
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0]])
    mask = mask.bool()
    whole = fastgrpo.mask_truncated_completions(mask, ids, 2).any(1)
    assert whole.tolist() == [True, False, False, False, False]
    several = fastgrpo.mask_truncated_completions(mask, ids, [2, 3])
    assert several.any(1).tolist() == [True, False, False, True, False]
    assert torch.equal(several[3], mask[3]), "what was masked stays masked"


ONES = torch.ones(2, 3)
BAD = {
    "kl: expected one of": lambda: fastgrpo.kl_penalty(ONES, ONES, ONES.bool(), kl="k4"),
    "ref_logps: expected shape": lambda: fastgrpo.kl_penalty(ONES, ONES[:1], ONES.bool()),
    "logps: expected dtype": lambda: fastgrpo.kl_penalty(ONES.int(), ONES, ONES.bool()),
    r"completion_mask: expected shape \(B, T\)": lambda: fastgrpo.kl_penalty(
        ONES, ONES, torch.ones(6).bool()
    ),
    "completion_mask: expected dtype": lambda: fastgrpo.token_rewards(ONES[:, 0], ONES),
    "rewards: expected shape": lambda: fastgrpo.token_rewards(ONES[0], ONES.bool()),
    "rewards: expected finite": lambda: fastgrpo.length_penalty(ONES[0] * math.inf, ONES[0], 3),
    "lengths: expected shape": lambda: fastgrpo.length_penalty(ONES[0], ONES[0, :2], 3),
    "weight: expected": lambda: fastgrpo.length_penalty(ONES[0], ONES[0], 3, weight=-1.0),
    "group_ids_or_size: expected": lambda: fastgrpo.length_penalty(ONES[0], ONES[0], 2),
    "lengths: expected finite": lambda: fastgrpo.soft_overlong_punishment(
        -ONES[0], max_completion_length=8, cache_length=2
    ),
    "cache_length: expected an int": lambda: fastgrpo.soft_overlong_punishment(
        ONES[0], max_completion_length=8, cache_length=0
    ),
    "cache_length: expected at most": lambda: fastgrpo.soft_overlong_punishment(
        ONES[0], max_completion_length=8, cache_length=9
    ),
    "max_completion_length: expected an int": lambda: fastgrpo.soft_overlong_punishment(
        ONES[0], max_completion_length=8.5, cache_length=2
    ),
    "completion_ids: expected dtype": lambda: fastgrpo.mask_truncated_completions(
        ONES.bool(), ONES, 2
    ),
    "eos_token_ids: expected an id": lambda: fastgrpo.mask_truncated_completions(
        ONES.bool(), ONES.long(), []
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


@pytest.mark.parametrize("ids", [None, (), "2", [True], 2.0])
def test_eos_token_ids_are_ids(ids):
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="eos_token_ids: expected an id or several"):
        fastgrpo.mask_truncated_completions(mask, torch.zeros(2, 3, dtype=torch.int64), ids)
