"""`group_advantages` against a loop over groups in fp64."""

from __future__ import annotations

import pytest
import torch

from fastgrpo_kernels import group_advantages

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
]


def pack(groups, dtype=torch.int64):
    lengths = torch.tensor([0] + [len(g) for g in groups])
    return torch.tensor([r for g in groups for r in g]), lengths.cumsum(0).to(dtype)


def oracle(groups, normalize, ddof, eps):
    out = []
    for group in groups:
        rewards = torch.tensor(group, dtype=torch.float32).double()
        scored = rewards[~rewards.isnan()]
        if len(scored) < 2 or scored.min() == scored.max():
            out.append(torch.zeros_like(rewards))
            continue
        scale = 1 / (scored.std(correction=ddof) + eps) if normalize else 1.0
        out.append(((rewards - scored.mean()) * scale).nan_to_num(nan=0.0))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "normalize, ddof, eps", [(True, 1, 1e-4), (True, 0, 1e-6), (False, 1, 1e-4)]
)
def test_against_a_loop(normalize, ddof, eps, dtype):
    rewards, cu_groups = pack(GROUPS, dtype)
    actual = group_advantages(rewards, cu_groups, normalize, ddof, eps)
    expected = oracle(GROUPS, normalize, ddof, eps)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    assert (actual[expected == 0] == 0).all(), "unscored and constant: exactly 0"


def test_constant_groups_are_exactly_zero_at_any_size():
    """Sums of 0.1 round; eps = 0 would turn any remainder into anything."""
    groups = [[0.1] * size for size in (2, 3, 7, 8, 9, 31)] + [[1e8] * 5]
    rewards, cu_groups = pack(groups)
    assert (group_advantages(rewards, cu_groups, True, 1, 0.0) == 0).all()


def test_a_large_mean_does_not_cost_the_digits_of_the_spread():
    """Rewards 4096 + k / 2048: exact in fp32, while their mean is not."""
    groups = [[4096 + k / 2048 for k in (0, 1, 5, 6, 7, 2, 2)], [4096 + k / 2048 for k in (1, 2)]]
    rewards, cu_groups = pack(groups)
    actual = group_advantages(rewards, cu_groups, True, 1, 0.0)
    torch.testing.assert_close(actual.double(), oracle(groups, True, 1, 0.0), rtol=1e-5, atol=1e-5)


def test_no_groups():
    assert group_advantages(*pack([]), True, 1, 1e-4).shape == (0,)
