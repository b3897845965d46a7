"""When memory runs out the budget of tokens halves, and the result stays."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastgrpo.train.optimizer import MasterAdamW
from fastgrpo.train.reference import Reference

from .conftest import with_copy


def out_of_memory_above(monkeypatch, policy, tokens: int) -> list[int]:
    """Have every forward of more completion tokens fail, after some of the gradients are there."""
    sizes = []
    forward = type(policy).completion_hidden

    def limited(self, rollout):
        sizes.append(len(rollout.token_ids))
        if sizes[-1] > tokens:
            raise torch.OutOfMemoryError("planted")
        return forward(self, rollout)

    monkeypatch.setattr(type(policy), "completion_hidden", limited)
    return sizes


def test_the_update_is_the_same_with_less_memory(
    script, policy, rollout, config, monkeypatch, capsys
) -> None:
    config = dataclasses.replace(config, beta=0.0, max_tokens_per_microbatch=1000)
    learners = [with_copy(policy) for _ in range(2)]
    results = []
    for learner in learners:
        if learner is learners[1]:
            sizes = out_of_memory_above(monkeypatch, policy, 20)
        optimizer, grads = MasterAdamW(learner.model.parameters(), 1e-3, 10), []
        optimizer.step = lambda *_, o=optimizer, g=grads: (
            g.extend(p.grad.clone() for p in o.masters) or 0.0
        )
        _, metrics = script.update(learner, optimizer, rollout, config)
        results.append((metrics, grads))
    assert max(sizes) > 20 and sizes[-1] <= 20
    halved = config.max_tokens_per_microbatch
    assert 1 < halved < 1000
    printed = capsys.readouterr().out
    assert f"memory ran out: --max-tokens-per-microbatch is {halved} from here on" in printed
    (whole, grads), (parts, again) = results
    assert parts == pytest.approx(whole, rel=1e-4, abs=1e-6)
    for x, y in zip(grads, again, strict=True):
        bar = 1e-6 * x.abs().max().item() + 1e-8
        torch.testing.assert_close(x, y, rtol=2e-5, atol=bar)


def test_the_reference_too(script, policy, rollout, config, monkeypatch) -> None:
    config.max_tokens_per_microbatch = 1000
    expected = Reference(policy).logps(rollout, 1000, 1.0, "torch")
    out_of_memory_above(monkeypatch, policy, 20)

    reference = Reference(policy)
    found = script.fitting(config, lambda tokens: reference.logps(rollout, tokens, 1.0, "torch"))
    assert config.max_tokens_per_microbatch < 1000
    torch.testing.assert_close(found, expected)


def test_what_does_not_fit_at_all_is_an_error(script, policy, rollout, config, monkeypatch) -> None:
    config = dataclasses.replace(config, beta=0.0)
    out_of_memory_above(monkeypatch, policy, 0)
    optimizer = MasterAdamW(policy.model.parameters(), 1e-3, 10)
    with (
        pytest.warns(UserWarning, match="max_tokens_per_microbatch"),
        pytest.raises(torch.OutOfMemoryError, match="planted"),
    ):
        script.update(policy, optimizer, rollout, config)
    assert all(p.grad is None for p in policy.model.parameters())
