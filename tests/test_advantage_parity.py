"""The advantages of other trainers, with their arithmetic written out and their settings."""

from __future__ import annotations

import pytest
import torch

import fastgrpo

G = 4


@pytest.fixture
def rewards():
    return torch.rand(5 * G, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def some_unscored(rewards):
    """Groups with one unscored completion, with one scored completion, with none."""
    rewards[1] = rewards[5:8] = rewards[8:12] = torch.nan
    return rewards


@pytest.fixture
def mask():
    lengths = torch.randint(1, 7, (5 * G,), generator=torch.Generator().manual_seed(1))
    return torch.arange(7) < lengths[:, None]


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=2e-5, atol=2e-6)


@pytest.fixture(scope="module")
def nanstd():
    return pytest.importorskip("trl.trainer.utils").nanstd


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trl_grpo(some_unscored, scale, nanstd):
    r = some_unscored.view(-1, G)
    std = {"group": nanstd(r, dim=1, keepdim=True), "batch": nanstd(r), "none": None}[scale]
    wanted = r - r.nanmean(dim=1, keepdim=True)
    wanted = wanted if std is None else wanted / (std + 1e-4)
    estimator = {"group": "grpo", "batch": "grpo_batch", "none": "dr_grpo"}[scale]
    actual = fastgrpo.group_advantages(some_unscored, G, estimator=estimator)
    close(actual, wanted.nan_to_num(0.0).flatten())


def test_trl_normalize_then_sum(some_unscored, nanstd):
    r = torch.stack([some_unscored, some_unscored.flip(0) ** 2, some_unscored.roll(7)], 1)
    weights = [1.0, 0.5, 2.0]
    grouped = r.view(-1, G, 3)
    scores = (grouped - grouped.nanmean(1, keepdim=True)) / (nanstd(grouped, 1, True) + 1e-4)
    total = (scores.view(-1, 3) * torch.tensor(weights)).nansum(1)
    total[r.isnan().all(1)] = torch.nan
    assert r.isnan().any(1).sum() > r.isnan().all(1).sum() > 0
    wanted = (total - total.nanmean()) / (nanstd(total) + 1e-4)
    actual = fastgrpo.group_advantages(r, G, estimator="gdpo", reward_weights=weights)
    close(actual, wanted.nan_to_num(0.0))


def test_trl_rloo(some_unscored):
    r = some_unscored.view(-1, G)
    scorable = (~r.isnan()).sum(1, keepdim=True)
    wanted = r - (r.nansum(1, keepdim=True) - r) / (scorable - 1)
    actual = fastgrpo.group_advantages(some_unscored, G, estimator="rloo")
    close(actual, wanted.nan_to_num(0.0).flatten())


def test_trl_async_grpo_and_open_instruct(rewards):
    """numpy's std over the group: ddof 0."""
    r = rewards.view(-1, G)
    wanted = (r - r.mean(1, keepdim=True)) / (r.std(1, correction=0, keepdim=True) + 1e-8)
    close(fastgrpo.group_advantages(rewards, G, ddof=0, eps=1e-8), wanted.flatten())


def masked_whiten(values, mask, unbiased):
    """verl's; OpenRLHF and NeMo-RL divide by the number of tokens and bound the variance below."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean) ** 2 * mask).sum() / count
    if unbiased:
        return (values - mean) * torch.rsqrt(variance * count / (count - 1) + 1e-8) * mask
    return (values - mean) * variance.clamp(min=1e-8).rsqrt() * mask


def test_verl_grpo_passk(rewards):
    wanted = torch.zeros_like(rewards)
    for start in range(0, len(rewards), G):
        group = rewards[start : start + G]
        (best, second), (at, _) = group.topk(2)
        wanted[start + at] = (best - second) / (group.std() + 1e-6)
    close(fastgrpo.group_advantages(rewards, G, estimator="grpo_passk", eps=1e-6), wanted)


def test_verl_gpg(rewards):
    rewards[::3] = 0.0
    alpha = len(rewards) / torch.count_nonzero(rewards)
    r = rewards.view(-1, G)
    wanted = alpha * (r - r.mean(1, keepdim=True)) / 2.0
    actual = fastgrpo.group_advantages(rewards, G, estimator="gpg", f_norm=2.0)
    close(actual, wanted.flatten())


def test_verl_opo(rewards, mask):
    lengths, r = mask.sum(1).view(-1, G), rewards.view(-1, G)
    baseline = (lengths * r).sum(1, keepdim=True) / lengths.sum(1, keepdim=True)
    actual = fastgrpo.group_advantages(rewards, G, estimator="opo", lengths=mask.sum(1))
    close(actual, (r - baseline).flatten())


@pytest.mark.parametrize("unbiased", [True, False], ids=["verl", "OpenRLHF and NeMo-RL"])
def test_reinforce_plus_plus_baseline(rewards, mask, unbiased):
    r = rewards.view(-1, G)
    centred = (r - r.mean(1, keepdim=True)).flatten()[:, None] * mask
    actual = fastgrpo.group_advantages(
        rewards,
        G,
        estimator="reinforce_plus_plus_baseline",
        lengths=mask.sum(1),
        ddof=int(unbiased),
    )
    close(actual[:, None] * mask, masked_whiten(centred, mask, unbiased))


def test_openrlhf_reinforce_plus_plus_baseline_with_kl_in_the_reward(rewards, mask):
    r, generator = rewards.view(-1, G), torch.Generator().manual_seed(2)
    logps, ref_logps = torch.randn(2, *mask.shape, generator=generator)
    per_token = -0.1 * (logps - ref_logps) * mask
    last = mask.sum(1, keepdim=True) - 1
    per_token.scatter_add_(1, last, (r - r.mean(1, keepdim=True)).view(-1, 1))
    returns = per_token.flip(1).cumsum(1).flip(1)
    centred = fastgrpo.group_advantages(rewards, G, estimator="dr_grpo")
    penalty = 0.1 * fastgrpo.kl_penalty(logps, ref_logps, mask)
    actual = fastgrpo.reinforce_plus_plus(
        fastgrpo.token_rewards(centred, mask) - penalty, mask, ddof=0
    )
    close(actual, masked_whiten(returns, mask, unbiased=False))


def test_verl_gdpo(rewards, mask):
    total = torch.zeros(mask.shape)
    columns = torch.stack([rewards, rewards.roll(3) ** 2], 1)
    for weight, column in zip((1.0, 0.25), columns.unbind(1), strict=True):
        r = column.view(-1, G)
        score = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)
        total += weight * score.view(-1, 1) * mask
    actual = fastgrpo.group_advantages(
        columns,
        G,
        estimator="gdpo",
        eps=1e-6,
        reward_weights=(1.0, 0.25),
        lengths=mask.sum(1),
    )
    close(actual[:, None] * mask, masked_whiten(total, mask, unbiased=True))


def test_nemo_rl_leave_one_out(rewards):
    """Means of the others as a product with 1 - identity; groups with a single success too."""
    rewards[:4] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    wanted = []
    for r in rewards.double().view(-1, G):
        others = 1 - torch.eye(G, dtype=torch.float64)
        n = G - 1
        baseline, square = others @ r / n, others @ r**2 / n
        std = ((square - baseline**2) * n / (n - 1)).sqrt()
        wanted.append(torch.where(std > 0, (r - baseline) / (std + 1e-6), r - baseline))
    actual = fastgrpo.group_advantages(rewards, G, estimator="grpo_loo", eps=1e-6)
    assert wanted[0][1] == 1, "not sharpened: the others do not vary"
    close(actual, torch.cat(wanted).float())


def test_prime_rl_max_rl_and_length_penalty(rewards):
    lengths = torch.arange(3, 3 + len(rewards))
    r, length = rewards.view(-1, G), lengths.view(-1, G)
    wanted = (r - r.mean(1, keepdim=True)) / r.mean(1, keepdim=True)
    close(fastgrpo.group_advantages(rewards, G, estimator="max_rl"), wanted.flatten())
    share = 0.25 * length / length.amax(1, keepdim=True)
    shaped = r - r.mean(1, keepdim=True) * share
    close(fastgrpo.length_penalty(rewards, lengths, G), shaped.flatten())


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_verl_reinforce_plus_plus(mask, gamma):
    """Backwards over the tokens; those of a tool, masked, hand the return on undiscounted."""
    mask[:, 2] &= torch.arange(len(mask)) % 2 == 0
    token_rewards = torch.randn(mask.shape, generator=torch.Generator().manual_seed(3))
    returns, running = torch.zeros_like(token_rewards), torch.zeros(len(mask))
    for t in reversed(range(mask.shape[1])):
        new = token_rewards[:, t] + gamma * running
        returns[:, t] = new * mask[:, t]
        running = torch.where(mask[:, t], new, running)
    actual = fastgrpo.reinforce_plus_plus(token_rewards, mask, gamma=gamma)
    close(actual, masked_whiten(returns, mask, unbiased=True))
