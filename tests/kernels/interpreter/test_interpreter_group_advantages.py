"""`group_stats` and every estimator that uses it: the kernel against its twin and fp64."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
import fastgrpo_kernels
from fastgrpo import torch_kernels
from fastgrpo.advantages import estimators, of_completions
from fastgrpo_kernels import GroupStats, group_stats

NAN = float("nan")
# Longer than a block; of one; two; with unscored members; all unscored; one scored; empty.
GROUPS = [
    torch.randn(21, generator=torch.Generator().manual_seed(0)).tolist(),
    [3.0],
    [1.0, 0.0],
    [1.0, NAN, 0.0, 0.5, NAN],
    [NAN, NAN],
    [NAN, 2.0],
    [],
    [0.1, 0.1, 0.1, NAN],  # constant, in a number that fp32 cannot hold
    [0.0, 1.0, 1.0, 0.0],
    [0.1, 0.1, 0.1, 7.0],  # constant without one of them
]
WEIGHTS = [2.0, 0.0, 1.0, 5.0, 3.0]  # repeated over the rows


def pack(groups, dtype=torch.int64):
    lengths = torch.tensor([0] + [len(g) for g in groups])
    return torch.tensor([r for g in groups for r in g]), lengths.cumsum(0).to(dtype)


def oracle(groups, weights, leave_one_out):
    """The definition, a row at a time; `weights` as long as the rows of all groups."""
    rows = []
    start = 0
    for group in groups:
        r = torch.tensor(group, dtype=torch.float32).double()
        w = weights[start : start + len(r)].double() * ~r.isnan()
        start += len(r)
        for i, own in enumerate(r):
            member = w > 0
            if leave_one_out:
                member[i] = False
            own = own.nan_to_num(0.0)
            if not member.any():
                rows.append([0.0, own, 0.0, 0.0, own])
                continue
            x, weight = r[member], w[member]
            mean = (weight * x).sum() / weight.sum() if x.max() > x.min() else x[0]
            square = (weight * (x - mean).square()).sum()
            gap = torch.where(r[i].isnan(), 0.0, own - mean)
            rows.append([weight.sum(), mean, gap, square, x.max()])
    return GroupStats(*torch.tensor(rows, dtype=torch.float64).T)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("leave_one_out", [False, True], ids=["group", "others"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    "implementation", [fastgrpo_kernels, torch_kernels], ids=["kernel", "twin"]
)
def test_against_the_definition(implementation, weighted, leave_one_out, dtype):
    rewards, cu_groups = pack(GROUPS, dtype)
    weights = torch.tensor(WEIGHTS).repeat(len(rewards))[: len(rewards)]
    actual = implementation.group_stats(
        rewards, cu_groups, weights if weighted else None, leave_one_out
    )
    expected = oracle(GROUPS, weights if weighted else torch.ones_like(weights), leave_one_out)
    for name, a, e in zip(GroupStats._fields, actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)
    for name in ("gap", "square"):
        zero = getattr(expected, name) == 0
        assert zero.any() and (getattr(actual, name)[zero] == 0).all(), f"{name}: exactly 0"


@pytest.mark.parametrize(
    "implementation", [fastgrpo_kernels, torch_kernels], ids=["kernel", "twin"]
)
@pytest.mark.parametrize("leave_one_out", [False, True], ids=["group", "others"])
def test_constant_groups_are_exactly_zero_at_any_size(implementation, leave_one_out):
    """Sums of 0.1 round; eps = 0 would turn any remainder into anything."""
    groups = [[0.1] * size for size in (2, 7, 9, 17)] + [[1e8] * 5]
    stats = implementation.group_stats(*pack(groups), leave_one_out=leave_one_out)
    assert (stats.gap == 0).all() and (stats.square == 0).all()


@pytest.mark.parametrize(
    "implementation", [fastgrpo_kernels, torch_kernels], ids=["kernel", "twin"]
)
@pytest.mark.parametrize("leave_one_out", [False, True], ids=["group", "others"])
def test_a_large_mean_does_not_cost_the_digits_of_the_spread(implementation, leave_one_out):
    """Rewards 4096 + k / 2048: exact in fp32, while their mean is not."""
    groups = [[4096 + k / 2048 for k in (0, 1, 5, 6, 7, 2, 2)], [4096 + k / 2048 for k in (1, 2)]]
    rewards, cu_groups = pack(groups)
    actual = implementation.group_stats(rewards, cu_groups, leave_one_out=leave_one_out)
    expected = oracle(groups, torch.ones_like(rewards), leave_one_out)
    torch.testing.assert_close(actual.gap.double(), expected.gap, rtol=1e-5, atol=0)
    torch.testing.assert_close(actual.square.double(), expected.square, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "implementation", [fastgrpo_kernels, torch_kernels], ids=["kernel", "twin"]
)
def test_the_others_of_an_outlier_keep_their_digits(implementation):
    """fp32 holds nothing of the others' squares beside the outlier's."""
    stats = implementation.group_stats(*pack([[1e6, 1.0, 2.0, 4.0]]), leave_one_out=True)
    assert abs(stats.square[0].item() / (14 / 3) - 1) < 1e-6


def test_no_groups():
    assert group_stats(*pack([])).gap.shape == (0,)


OPTIONS = {
    "opo": ("lengths",),
    "reinforce_plus_plus_baseline": ("lengths",),
    "remax": ("greedy_rewards",),
}


@pytest.mark.parametrize("estimator", estimators.ESTIMATORS)
def test_every_estimator_on_the_kernel(estimator, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(24, 2, generator=generator)
    rewards[3] = NAN
    rewards[:, 0][torch.arange(24) % 5 == 2] = 0.5  # a group without contrast
    tensors = {
        "lengths": torch.randint(1, 9, (24,), generator=generator),
        "greedy_rewards": torch.randn(24, generator=generator),
    }
    options = {name: tensors[name] for name in OPTIONS.get(estimator, ())}
    rewards = rewards if estimator == "gdpo" else rewards[:, 0]

    def run():
        return fastgrpo.group_advantages(
            rewards, torch.arange(24) % 5, estimator=estimator, return_live_groups=True, **options
        )

    expected, expected_live = run()
    calls = []

    def on_kernels(work, backend, like):
        calls.append(backend)
        return work(fastgrpo_kernels)

    monkeypatch.setattr(of_completions.choice, "run", on_kernels)
    actual, live = run()
    assert calls == ["auto"]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert live == expected_live
