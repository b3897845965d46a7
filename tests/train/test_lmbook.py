"""--preset lmbook: loss and gradients of the program's formulas, written anew with plain logits."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from fastgrpo import group_advantages
from fastgrpo.train.completions import Rollout
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.model import Policy
from fastgrpo.train.optimizer import MasterAdamW
from fastgrpo.train.rewards import Reward
from fastgrpo.train.sampler import ModelSampler
from fastgrpo.train.scoring import centred
from fastgrpo.train.tasks import Task

from .conftest import own_logps

G, EPSILON, BETA = 4, 0.1, 0.04
REWARDS = [2.8, 0.0, 1.3, 0.8, 0.5, 0.5, 2.0, -0.1, 0.2, 0.4, 0.4, 0.4]


def preset() -> TrainConfig:
    files = {"data": "x", "model": "y"}
    return TrainConfig(preset="lmbook", **files, backend="torch", max_grad_norm=1e9, device="cpu")


Tokens = tuple[Tensor, ...]  # a tensor of (tokens,) for each completion


def token_logps(policy: Policy, rollout: Rollout) -> Tokens:
    """The log-probs of each completion's tokens, from all logits."""
    return own_logps(policy.model, rollout).split(rollout.lengths.tolist())


def program(policy: Policy, rollout: Rollout, old: Tokens, ref: Tokens) -> Tensor:
    """The loss as the program computes it, a completion at a time."""
    rewards = torch.tensor(REWARDS).view(-1, G)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    means = []
    for now, before, start, advantage in zip(
        token_logps(policy, rollout), old, ref, advantages.flatten(), strict=True
    ):
        ratio = (now - before).exp()
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        kl = (start - now).exp() - (start - now) - 1
        means.append((torch.minimum(ratio * advantage, clipped * advantage) - BETA * kl).mean())
    return -torch.stack(means).mean()


@pytest.mark.parametrize("mu", [1, 2])
def test_an_update_is_the_programs(script, policy, rollout, mu: int) -> None:
    config = dataclasses.replace(preset(), num_iterations=mu)
    assert config.loss_config().epsilon_low == EPSILON and config.beta == BETA
    with torch.no_grad():
        ref = token_logps(policy, rollout)
        for parameter in policy.model.parameters():  # the policy has left its reference
            parameter += 0.01 * torch.randn_like(parameter)
        old = token_logps(policy, rollout)
        if mu > 1:  # and in the second of two updates the sampler, too
            for parameter in policy.model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    rollout = dataclasses.replace(
        rollout,
        advantages=group_advantages(centred(rewards, G), G),
        old_logps=torch.cat(old) if mu > 1 else None,
        ref_logps=torch.cat(ref),
    )
    plain = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    expected = program(plain, rollout, old, ref)
    expected.backward()
    wanted = dict(plain.model.named_parameters())

    optimizer = MasterAdamW(policy.model.parameters(), 0.0, 10)
    found = {}
    names = [name for name, _ in policy.model.named_parameters()]
    optimizer.step = lambda *_: (
        found.update(zip(names, [p.grad for p in optimizer.masters], strict=True)) or 0.0
    )
    _, metrics = script.update(policy, optimizer, rollout, config)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    if mu > 1:
        assert metrics["clip_region"] > 0
    for name, grad in found.items():
        error = (grad - wanted[name].grad).norm() / wanted[name].grad.norm()
        assert error <= 1e-5, name


def test_outer_iterations_start_from_the_policy(script, policy, rollout, task, monkeypatch) -> None:
    """The reference after two steps is the policy of that moment."""
    seen = []
    sample = script.sample_groups

    def spy(run, reference, *rest):
        scoring = (rollout, 4096, 1.0, "torch")
        seen.append(torch.equal(policy.logps(*scoring), reference.logps(*scoring)))
        return sample(run, reference, *rest)

    monkeypatch.setattr(script, "sample_groups", spy)
    config = TrainConfig(
        device="cpu", backend="torch", warmup_steps=0, num_prompts=2, num_generations=4,
        max_steps=5, ref_model_sync_steps=2, beta=0.1, eval_every=0,
    )  # fmt: skip
    length = Reward("length", lambda completions: [len(text) for text in completions])
    task = dataclasses.replace(task, rewards=(length,))
    script.train(FakeRun(config, policy, task), policy, task, config)
    assert seen == [True, False, True, False, True]


class FakeRun:
    """A run that neither evaluates nor logs."""

    def __init__(self, config: TrainConfig, policy: Policy, task: Task) -> None:
        self.config, self.policy, self.task = config, policy, task
        self.sampler = ModelSampler(policy)

    def steps(self, count: int, title: str) -> range:
        return range(1, count + 1)

    def __getattr__(self, name: str):
        return lambda *_, **__: None
