"""Held-out accuracy: prompts of like length together, results in the order of the task."""

from __future__ import annotations

import dataclasses

import pytest

from fastgrpo.train.evaluation import evaluate
from fastgrpo.train.rewards import Accuracy, Reward
from fastgrpo.train.sampler import ModelSampler
from fastgrpo.train.tasks import Example


class Watched(ModelSampler):
    """Notes the lengths of the prompts of each call."""

    def __init__(self, policy) -> None:
        super().__init__(policy)
        self.calls: list[list[int]] = []

    def sample(self, prompts, num_generations, sampling):
        self.calls.append([len(prompt) for prompt in prompts])
        assert (num_generations, sampling.temperature) == (1, 0.0)
        return super().sample(prompts, num_generations, sampling)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batches_do_not_change_the_result(policy, task, batch_size: int) -> None:
    prompts = ["1+2=", "12345+67890=", "1+2+3+4+5+6+7+8+9=", "7+8=", "123+4=", "99+1="]
    task = dataclasses.replace(task, held_out=[Example(p, str(i)) for i, p in enumerate(prompts)])
    number = Reward("number", lambda completions, answer, **_: [float(a) for a in answer])
    task = dataclasses.replace(task, rewards=(number,))
    sampler, safe_points = Watched(policy), []
    found = evaluate(policy, sampler, task, batch_size, 4, lambda: safe_points.append(1))
    assert [prompt for prompt, _, _ in found.samples] == prompts
    assert [reward for _, _, reward in found.samples] == list(range(6))
    alone = []
    for example in task.held_out:
        one = dataclasses.replace(task, held_out=[example])
        alone += evaluate(policy, ModelSampler(policy), one, 1, 4, lambda: None).samples
    assert found.samples == alone
    assert found.seconds > 0 and len(safe_points) == len(sampler.calls)
    flat = [length for call in sampler.calls for length in call]
    assert flat == sorted(flat, reverse=True)
    budget = batch_size * (max(flat) + 4)
    assert all(sum(length + 4 for length in call) <= budget for call in sampler.calls)
    assert batch_size > 1 or max(map(len, sampler.calls)) > 1  # short prompts share a batch


def test_accuracy_counts_what_is_correct(policy, task) -> None:
    held_out = [Example("1+2=", "3"), Example("2+2=", "4"), Example("3+2=", "5")]
    odd = Accuracy(lambda completions, answer, **_: [float(a in "35") for a in answer], 1.0)
    task = dataclasses.replace(task, held_out=held_out, accuracy=odd)
    accuracy = evaluate(policy, ModelSampler(policy), task, 2, 3, lambda: None).accuracy
    assert accuracy == pytest.approx(2 / 3)
