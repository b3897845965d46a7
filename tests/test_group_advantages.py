"""`group_advantages` against plain Python."""

from __future__ import annotations

import math
from statistics import fmean, pstdev, stdev
from types import SimpleNamespace

import pytest
import torch

import fastgrpo
from fastgrpo.advantages.estimators import ESTIMATORS

nan = math.nan
WHITENED = "reinforce_plus_plus_baseline"


def std(values, ddof):
    if len(values) <= ddof:
        return 0.0
    return stdev(values) if ddof else pstdev(values)


def grpo(x, ddof=1, eps=1e-4):
    return (x.r - fmean(x.group)) / (std(x.group, ddof) + eps)


def grpo_batch(x, ddof=1, eps=1e-4):
    return (x.r - fmean(x.group)) / (std(x.batch, ddof) + eps)


def grpo_loo(x, ddof=1, eps=1e-4):
    spread = std(x.others, ddof)
    return (x.r - fmean(x.others)) / (spread + eps if spread > 0 else 1.0)


def grpo_passk(x, ddof=1, eps=1e-4):
    best, second = sorted(x.group, reverse=True)[:2]
    return (best - second) / (std(x.group, ddof) + eps) if x.r == best else 0.0


def gpg(x, f_norm=1.0):
    return len(x.batch) / sum(r != 0 for r in x.batch) * (x.r - fmean(x.group)) / f_norm


def max_rl(x):
    return (x.r - fmean(x.group)) / fmean(x.group) if fmean(x.group) > 0 else 0.0


def opo(x):
    return x.r - sum(n * r for n, r in zip(x.lengths, x.group, strict=True)) / sum(x.lengths)


# The formula of one scored completion whose group is not constant, in Python's floats: x has its
# reward r, the scored rewards of its group, of the others in it and of the batch, and lengths of
# the group.
FORMULAS = {
    "grpo": grpo,
    "dr_grpo": lambda x: x.r - fmean(x.group),
    "grpo_batch": grpo_batch,
    "grpo_loo": grpo_loo,
    "grpo_passk": grpo_passk,
    "rloo": lambda x: x.r - fmean(x.others),
    "gpg": gpg,
    "max_rl": max_rl,
    "opo": opo,
}


def by_group(formula, rewards, ids, lengths=None, **options):
    advantages = []
    for i, r in enumerate(rewards):
        same = [j for j, x in enumerate(rewards) if ids[j] == ids[i] and x == x]
        x = SimpleNamespace(
            r=r,
            group=[rewards[j] for j in same],
            others=[rewards[j] for j in same if j != i],
            batch=[x for x in rewards if x == x],
            lengths=[lengths[j] for j in same] if lengths else None,
        )
        contrast = r == r and len(set(x.group)) > 1
        advantages.append(formula(x, **options) if contrast else 0.0)
    return advantages


def whiten_tokens(values, scored, lengths, ddof):
    """Every token of a completion holds the completion's value."""
    tokens = [v for v, s, n in zip(values, scored, lengths, strict=True) if s for _ in range(n)]
    scale = math.sqrt(std(tokens, ddof) ** 2 + 1e-8)
    return [(v - fmean(tokens)) / scale if s else 0.0 for v, s in zip(values, scored, strict=True)]


def oracle(estimator, rewards, ids, ddof=1, eps=1e-4, lengths=None, **options):
    """The advantages of a batch: rewards are a list, those of "gdpo" a list of K-tuples."""
    if estimator == "remax":
        gaps = [r - g for r, g in zip(rewards, options["greedy_rewards"], strict=True)]
        return [0.0 if gap != gap else gap for gap in gaps]
    if estimator == WHITENED:
        gaps = by_group(FORMULAS["dr_grpo"], rewards, ids)
        return whiten_tokens(gaps, [r == r for r in rewards], lengths, ddof)
    if estimator != "gdpo":
        if "eps" in ESTIMATORS[estimator].uses:
            options |= {"ddof": ddof, "eps": eps}
        return by_group(FORMULAS[estimator], rewards, ids, lengths, **options)
    columns = [
        by_group(grpo, list(column), ids, ddof=ddof, eps=eps)
        for column in zip(*rewards, strict=True)
    ]
    weights = options.get("reward_weights") or [1.0] * len(columns)
    values = [
        sum(w * x for w, x in zip(weights, row, strict=True)) for row in zip(*columns, strict=True)
    ]
    scored = [any(r == r for r in row) for row in rewards]
    if lengths:
        return whiten_tokens(values, scored, lengths, ddof)
    kept = [v for v, s in zip(values, scored, strict=True) if s]
    scale = std(kept, ddof) + eps
    return [(v - fmean(kept)) / scale if s else 0.0 for v, s in zip(values, scored, strict=True)]


random = torch.Generator().manual_seed(0)
LARGE = (4096 + torch.randint(1, 9, (12,), generator=random) / 2048).tolist()
BATCHES = {
    "pairs": ([1.0, 0.0, 2.0, 5.0], [0, 0, 1, 1]),
    "any order, any size": ([1.0, 0.5, 2.0, 3.0, -1.0, 4.0, 0.0], [7, -3, 7, 7, -3, 9, 9]),
    "unscored": ([1.0, nan, 2.0, nan, nan, 3.0], [0, 0, 0, 1, 1, 1]),
    "one scored member": ([1.0, nan, nan, 2.0, 0.5, 0.0], [0, 0, 0, 1, 2, 2]),
    "nearly constant": ([0.1, 0.1, 0.1 + 1e-7, 0.1], [0, 0, 0, 0]),
    "constant but one": ([0.1, 0.1, 0.7, 0.1, 1.0, 1.0, 1.0], [0, 0, 0, 0, 1, 1, 1]),
    "a single success": ([0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [0, 0, 0, 1, 1, 1]),
    "two best": ([1.0, 1.0, 0.0, 0.25, 0.75, 0.5], [0, 0, 0, 1, 1, 1]),
    "a large mean": (LARGE, [0, 1, 2, 1] * 3),
    "many": (
        torch.randn(40, generator=random).tolist(),
        torch.randint(7, (40,), generator=random).tolist(),
    ),
}
LENGTHS = torch.randint(1, 20, (40,), generator=random)
GREEDY = torch.randn(40, generator=random)
GREEDY[2] = nan


def arguments(estimator, rewards):
    """Rewards, and the options that the estimator needs, as tensors."""
    rewards = torch.tensor(rewards, dtype=torch.float32)
    if estimator == "gdpo":  # a second reward with gaps of its own, and the first's
        other = rewards.roll(1) * (torch.arange(len(rewards)) % 3)
        rewards = torch.stack([rewards, other.where(torch.arange(len(rewards)) != 3, nan)], 1)
    given = {"lengths": LENGTHS[: len(rewards)], "greedy_rewards": GREEDY[: len(rewards)]}
    return rewards, {name: given[name] for name in ESTIMATORS[estimator].needs}


def check(estimator, rewards, ids, **extra):
    rewards, options = arguments(estimator, rewards)
    options |= extra
    actual = fastgrpo.group_advantages(rewards, torch.tensor(ids), estimator=estimator, **options)
    options = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    wanted = torch.tensor(oracle(estimator, rewards.tolist(), ids, **options), dtype=torch.float64)
    assert actual.dtype == torch.float32 and actual.shape == wanted.shape
    error = (actual - wanted).abs().max()
    assert error <= 1e-5 * wanted.abs().max(), f"{error:.1e}\n{actual}\n{wanted}"
    if estimator not in (WHITENED, "remax") and "lengths" not in extra:
        assert (actual[wanted == 0] == 0).all(), "exactly 0"


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("rewards", "ids"), BATCHES.values(), ids=BATCHES)
def test_formula(rewards, ids, estimator):
    check(estimator, rewards, ids)


VARIATIONS = [
    *(
        (name, {"ddof": ddof, "eps": eps})
        for name in ESTIMATORS
        if "eps" in ESTIMATORS[name].uses
        for ddof, eps in ((0, 1e-8), (1, 0.0), (1, 1e-6), (0, 0.5))
    ),
    (WHITENED, {"ddof": 0}),
    ("gpg", {"f_norm": 0.5}),
    ("gdpo", {"reward_weights": (0.25, 2.0)}),
    ("gdpo", {"reward_weights": [1, 0]}),
    ("gdpo", {"lengths": LENGTHS}),
    ("gdpo", {"lengths": LENGTHS, "ddof": 0, "reward_weights": [0.5, 3.0]}),
]


@pytest.mark.parametrize(("estimator", "options"), VARIATIONS)
def test_options(estimator, options):
    rewards, ids = BATCHES["many"]
    check(estimator, rewards, ids, **options)


def call(estimator, rewards, groups, **extra):
    rewards, options = arguments(estimator, rewards)
    return fastgrpo.group_advantages(rewards, groups, estimator=estimator, **options, **extra)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fixed_groups_equal_groups_by_id(estimator):
    rewards = BATCHES["a large mean"][0]
    by_id = call(estimator, rewards, torch.arange(3).repeat_interleave(4))
    assert torch.equal(call(estimator, rewards, 4), by_id)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_in_another_order_have_the_same_advantages(estimator):
    rewards, ids = BATCHES["many"]
    rewards, options = arguments(estimator, [math.exp(r) for r in rewards])
    ids = torch.tensor(ids)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    expected, live = fastgrpo.group_advantages(
        rewards, ids, estimator=estimator, return_live_groups=True, **options
    )
    moved = {name: x[order] for name, x in options.items()}
    actual, live_moved = fastgrpo.group_advantages(
        rewards[order], 100 - ids[order], estimator=estimator, return_live_groups=True, **moved
    )
    assert torch.allclose(actual, expected[order], rtol=1e-5, atol=1e-6)
    assert expected.unique().numel() > 5 and live == live_moved == 7


def test_lengths_are_numbers_of_any_kind():
    rewards, ids = BATCHES["many"]
    rewards, ids = torch.tensor(rewards), torch.tensor(ids)
    results = [
        fastgrpo.group_advantages(rewards, ids, estimator="opo", lengths=lengths)
        for lengths in (LENGTHS, LENGTHS.int(), LENGTHS.float())
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1e6, nan])
@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"remax"}))
def test_a_batch_without_contrast_is_exactly_zero(value, size, estimator):
    rewards, options = arguments(estimator, [value] * 6)
    rewards.fill_(value)
    advantages, live = fastgrpo.group_advantages(
        rewards, size, estimator=estimator, return_live_groups=True, **options
    )
    assert advantages.eq(0).all() and live == 0


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"remax", WHITENED}))
def test_a_group_without_contrast_is_exactly_zero_beside_others(estimator):
    """Constant, of one, with one scored member, without any; the first group is alive."""
    rewards = [0.3, 0.9, 0.1, 0.1, 0.1, 0.1, 0.7, 0.4, nan, nan]
    ids = torch.tensor([0, 0, 1, 1, 1, 1, 2, 3, 3, 4])
    rewards, options = arguments(estimator, rewards)
    if estimator == "gdpo":
        rewards = torch.stack([rewards[:, 0], 2 * rewards[:, 0]], 1)
    if "eps" in ESTIMATORS[estimator].uses:
        options["eps"] = 0.0
    advantages, live = fastgrpo.group_advantages(
        rewards, ids, estimator=estimator, return_live_groups=True, **options
    )
    assert advantages[:2].abs().max() > 0.1 and advantages.isfinite().all()
    assert advantages[2:].eq(0).all()
    assert live == 1 and live.dtype == torch.int64 and live.shape == ()


@pytest.mark.parametrize("estimator", [WHITENED, "gdpo"])
def test_whitening_over_tokens_moves_groups_without_contrast_by_its_mean(estimator):
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, 2.0, nan])
    lengths = torch.tensor([3, 1, 2, 2, 1, 9])
    ids = torch.tensor([0, 0, 1, 1, 2, 3])
    advantages, live = fastgrpo.group_advantages(
        rewards[:, None] if estimator == "gdpo" else rewards,
        ids,
        estimator=estimator,
        lengths=lengths,
        return_live_groups=True,
    )
    tokens = advantages[:5].repeat_interleave(lengths[:5])
    assert abs(tokens.mean()) < 1e-6 and abs(tokens.std() - 1) < 1e-4
    assert advantages[2] == advantages[3] == advantages[4] < -0.1, "half of -m, and not scored 0"
    assert advantages[5] == 0 and live == 3


def test_equal_rewards_stay_exactly_zero_under_any_weights():
    """Sums of weight * reward round in fp64 too."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.rand(200, generator=generator)
    rewards = torch.rand(20, generator=generator).repeat_interleave(10)
    advantages = fastgrpo.group_advantages(rewards, 10, estimator="opo", lengths=lengths)
    assert advantages.eq(0).all()


def test_the_others_of_an_outlier_keep_their_digits():
    """In fp32, and even in fp64, nothing of their squares is left in a sum with the outlier's."""
    check("grpo_loo", [1e6, 0.10000093, 0.10000018, 0.10000027, 0.10000015], [0] * 5, eps=1e-9)
    check("grpo_loo", [1.0, 2.0, -1e7, 4.0, 1.0], [0] * 5)


def test_live_groups():
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5, nan, 2.0, 3.0, 1.0])
    for groups, wanted in ((2, 2), (1, 0), (4, 2), (8, 1)):
        advantages, live = fastgrpo.group_advantages(rewards, groups, return_live_groups=True)
        assert torch.equal(advantages, fastgrpo.group_advantages(rewards, groups))
        assert live == wanted
    assert fastgrpo.group_advantages(torch.empty(0), 4, return_live_groups=True)[1] == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_completions(estimator):
    assert call(estimator, [], 4).shape == (0,)
    assert call(estimator, [], torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_a_completion_without_tokens_weighs_nothing():
    rewards, lengths = torch.tensor([1.0, 0.0, 5.0, 1.0, 2.0]), torch.tensor([1, 3, 0, 0, 0])
    ids = torch.tensor([0, 0, 0, 1, 1])
    advantages = fastgrpo.group_advantages(rewards, ids, estimator="opo", lengths=lengths)
    assert torch.equal(advantages, torch.tensor([0.75, -0.25, 4.75, 0.0, 0.0]))


def test_rewards_get_no_gradient():
    rewards = torch.randn(4, requires_grad=True)
    assert not fastgrpo.group_advantages(rewards, 2).requires_grad


FOUR = torch.ones(4)
LENGTHS_4 = torch.ones(4, dtype=torch.int64)
BAD = {
    "rewards: expected dtype": (FOUR.double(), 2, {}),
    "rewards: expected shape": (torch.ones(2, 2), 2, {}),
    "rewards: expected finite": (torch.tensor([1.0, math.inf]), 2, {}),
    "rewards: expected a tensor": ([1.0, 2.0], 2, {}),
    r"expected shape \(B, K\) for estimator='gdpo'": (FOUR, 2, {"estimator": "gdpo"}),
    "divisor of the 4 rewards": (FOUR, 3, {}),
    "group_ids_or_size: expected shape": (FOUR, torch.zeros(3, dtype=torch.int64), {}),
    "group_ids_or_size: expected dtype": (FOUR, torch.zeros(4), {}),
    "estimator: expected": (FOUR, 2, {"estimator": "zscore"}),
    "ddof: expected": (FOUR, 2, {"ddof": 2}),
    "ddof: expected 0 or 1, got True": (FOUR, 2, {"ddof": True}),
    "rewards: expected numbers of at most 1e.15 in magnitude, got 1e.20": (1e20 * FOUR, 2, {}),
    "rewards: expected K >= 1 rewards": (torch.ones(4, 0), 2, {"estimator": "gdpo"}),
    "eps: expected": (FOUR, 2, {"eps": -1.0}),
    "f_norm: expected": (FOUR, 2, {"estimator": "gpg", "f_norm": 0.0}),
    "lengths: expected shape .* got None": (FOUR, 2, {"estimator": "opo"}),
    "lengths: expected shape .* got": (FOUR, 2, {"estimator": "opo", "lengths": FOUR[:2]}),
    "lengths: expected dtype": (FOUR, 2, {"estimator": "opo", "lengths": FOUR.double()}),
    "lengths: expected finite numbers": (FOUR, 2, {"estimator": "opo", "lengths": -LENGTHS_4}),
    "greedy_rewards: expected shape .* got None": (FOUR, 2, {"estimator": "remax"}),
    "greedy_rewards: expected finite": (
        FOUR, 2, {"estimator": "remax", "greedy_rewards": FOUR * math.inf},
    ),
    "reward_weights: expected 2 numbers": (
        torch.ones(4, 2), 2, {"estimator": "gdpo", "reward_weights": [1.0]},
    ),
    "reward_weights: expected a finite number": (
        torch.ones(4, 2), 2, {"estimator": "gdpo", "reward_weights": [1.0, nan]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    rewards, groups, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        fastgrpo.group_advantages(rewards, groups, **options)


SET = {
    "ddof": 0,
    "eps": 1e-6,
    "lengths": LENGTHS_4,
    "reward_weights": (1.0, 2.0),
    "greedy_rewards": FOUR,
    "f_norm": 2.0,
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("option", SET)
def test_an_option_has_an_effect_or_is_refused(estimator, option):
    rewards = torch.tensor([1.0, 0.0, 0.5, 3.0])
    rewards = torch.stack([rewards, rewards.flip(0) ** 2], 1) if estimator == "gdpo" else rewards
    needed = {"lengths": torch.arange(1, 5), "greedy_rewards": torch.zeros(4)}
    options = {name: needed[name] for name in ESTIMATORS[estimator].needs}

    def run(**extra):
        return fastgrpo.group_advantages(rewards, 4, estimator=estimator, **options | extra)

    if option in ESTIMATORS[estimator].uses:
        assert not torch.equal(run(), run(**{option: SET[option]}))
    else:
        message = f"{option} has no effect with estimator='{estimator}'"
        with pytest.raises(ValueError, match=message):
            run(**{option: SET[option]})
