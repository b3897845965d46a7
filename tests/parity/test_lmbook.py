"""The loss of The LM Book's GRPO.py, the program from which this package started, written anew.

Rewards are centred in their group and divided by its std (n - 1) + 1e-4. Ratios are clipped at 0.2.
k3 is weighted by 0.1. The loss is the mean over completions of the mean over their tokens.
"""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig

G = 4
REWARDS = torch.tensor([2.8, 0.0, 1.3, 0.8, 0.5, 0.5, 2.0, -0.1])


def advantages_of(rewards):
    groups = rewards.view(-1, G)
    centred = groups - groups.mean(1, keepdim=True)
    deviation = (centred.square().sum(1, keepdim=True) / (G - 1)).sqrt()
    return (centred / (deviation + 1e-4)).flatten()


def loss_of(r):
    ratio, x = (r.logps - r.old).exp(), r.ref - r.logps
    policy = torch.minimum(ratio * r.A, ratio.clamp(0.8, 1.2) * r.A)
    objective = (policy - 0.1 * (x.exp() - x - 1)) * r.mask
    return -(objective.sum(1) / r.mask.sum(1)).mean()


@pytest.fixture
def complete(rollout):
    """Every completion has a token; the advantages are the seed's."""
    mask = rollout.completion_mask.clone()
    mask[:, 0] = True
    return rollout._replace(completion_mask=mask, advantages=advantages_of(REWARDS))


def test_advantages():
    ours = fastgrpo.group_advantages(REWARDS, G, estimator="grpo", ddof=1, eps=1e-4)
    torch.testing.assert_close(ours, advantages_of(REWARDS), rtol=1e-6, atol=1e-6)


def test_loss(complete, equal):
    """One of its mu = 3 inner iterations: old_logps are those of the rollout."""
    equal(loss_of, "lmbook", batch=complete)


def test_first_inner_iteration(complete, equal):
    """On-policy: the ratio is 1, and nothing is clipped."""
    logps = fastgrpo.linear_logps(complete.hidden.double(), complete.weight.double(), complete[2])
    on_policy = complete._replace(old_logps=logps.logps)
    out = equal(loss_of, "lmbook", batch=on_policy)
    assert out.metrics["clip_region"] == 0


def test_empty_completion(complete, equal):
    """Deviation: the seed divides 0 by 0 there, and its loss is NaN. Right is that the completion
    counts, with nothing.
    """
    mask = complete.completion_mask.clone()
    mask[2] = False
    batch = complete._replace(completion_mask=mask)

    def right(r):
        assert loss_of(r).isnan()
        x = r.ref - r.logps
        ratio = (r.logps - r.old).exp()
        policy = -torch.minimum(ratio * r.A, ratio.clamp(0.8, 1.2) * r.A)
        return r.sequence_mean(policy + 0.1 * (x.exp() - x - 1)).mean()

    equal(right, "lmbook", batch=batch)


def test_preset():
    assert LossConfig.preset("lmbook") == LossConfig(
        surrogate="ppo_clip", epsilon_low=0.2, epsilon_high=0.2, beta=0.1, kl="k3",
        aggregation="sequence_mean",
    )  # fmt: skip
