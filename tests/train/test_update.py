"""One optimizer step: what it forwards, what it leaves out, the reference and the schedule."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from torch import Tensor

from fastgrpo.train.arithmetic import arithmetic_task
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.layouts import LAYOUTS, Layout
from fastgrpo.train.microbatches import live_completions
from fastgrpo.train.model import Policy
from fastgrpo.train.optimizer import MasterAdamW
from fastgrpo.train.reference import Reference
from fastgrpo.train.rewards import Reward

from .conftest import with_copy


@pytest.fixture
def config(config):
    return dataclasses.replace(config, beta=0.0, max_grad_norm=1e9)


def spy(policy, seen: list[int]):
    """The policy, counting the completions that enter its model."""

    def hidden(model, rollout) -> Tensor:
        seen.append(len(rollout))
        return policy.layout.hidden(model, rollout)

    return dataclasses.replace(policy, layout=policy.layout._replace(hidden=hidden))


def optimizer_of(policy, **options) -> MasterAdamW:
    return MasterAdamW(policy.model.parameters(), 1e-3, 100, **options)


def gradients_of(optimizer: MasterAdamW) -> list[Tensor]:
    """A list that gets the gradient of every step from now on."""
    found: list[Tensor] = []
    optimizer.adamw.register_step_pre_hook(
        lambda *_: found.append(torch.cat([m.grad.flatten() for m in optimizer.masters]))
    )
    return found


def weights(policy) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


def test_flat_groups_do_not_enter_the_model_and_change_nothing(
    script, policy, rollout, config
) -> None:
    advantages = rollout.advantages.clone()
    advantages[4:8], advantages[10] = 0.0, 0.0
    rollout = dataclasses.replace(rollout, advantages=advantages)
    seen: list[int] = []
    results = []
    # A KL that weighs nothing keeps them in.
    for beta in (0.0, 1e-30):
        learner = with_copy(policy)
        optimizer = optimizer_of(learner)
        gradients = gradients_of(optimizer)
        batch = dataclasses.replace(
            rollout, ref_logps=learner.logps(rollout, 1000, 1.0, "torch") if beta else None
        )
        _, metrics = script.update(
            spy(learner, seen), optimizer, batch, dataclasses.replace(config, beta=beta)
        )
        results.append((gradients[0], metrics))
        assert (weights(learner) - weights(policy)).abs().max() > 1e-5
    assert seen == [7, 12]
    (found, metrics), (expected, whole) = results
    assert (found - expected).norm() < 1e-5 * expected.norm()
    for name in ("loss", "grad_norm"):
        assert metrics[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-7)
    assert metrics["live_completions"] == pytest.approx(7 / 12) and whole["live_completions"] == 1.0
    tokens = rollout.tokens_of((advantages != 0).nonzero()[:, 0]).float().mean().item()
    assert metrics["live_rows"] == pytest.approx(tokens)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}], ids=["momentum", "decay"])
def test_a_flat_batch_steps_as_zero_gradients_do(
    script, policy, rollout, config, options: dict
) -> None:
    """Also as the very first one, after which Adam counts a step."""
    flat = dataclasses.replace(rollout, advantages=torch.zeros(12))
    expected, found = with_copy(policy), with_copy(policy)
    adam = torch.optim.AdamW(
        expected.model.parameters(), lr=0.0, betas=(0.9, 0.98), **({"weight_decay": 0.0} | options)
    )
    optimizer = optimizer_of(found, **options)
    seen: list[int] = []
    for batch in (flat, rollout, flat, flat):
        for group in adam.param_groups:
            group["lr"] = optimizer.learning_rate
        _, metrics = script.update(spy(found, seen), optimizer, batch, config)
        if batch is flat:
            for p in expected.model.parameters():
                p.grad = torch.zeros_like(p)
            assert metrics["loss"] == metrics["grad_norm"] == metrics["live_completions"] == 0.0
        else:
            script.update(expected, _Gathers(), batch, config)
        adam.step()
        adam.zero_grad()
    assert seen == [12]
    torch.testing.assert_close(weights(found), weights(expected), atol=2e-7, rtol=0)


class _Gathers:
    """An optimizer that takes no step."""

    learning_rate = 0.0

    def clear(self) -> None:
        """Forget nothing."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, loss: float, max_grad_norm: float) -> float:
        return 0.0


def test_the_result_does_not_depend_on_layout_or_budget(script, policy, rollout, config) -> None:
    steps = {}
    for layout in LAYOUTS.values():
        for budget in (40, 10_000):
            learner = dataclasses.replace(with_copy(policy), layout=layout)
            script.update(
                learner,
                optimizer_of(learner),
                rollout,
                dataclasses.replace(config, max_tokens_per_microbatch=budget),
            )
            steps[layout.name, budget] = weights(learner) - weights(policy)
    expected = steps["padded", 10_000]
    assert expected.abs().max() > 1e-5
    for found in steps.values():
        # Adam's first step is the sign of a gradient: where that rounds around 0 it may be either.
        assert (found - expected).norm() < 1e-2 * expected.norm()


SEQUENCES = ["correction=seq_mask_tis", "correction_min=0.5", "correction_max=1.5"]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("grpo", []),
        ("gspo", []),
        ("cispo", []),
        ("dapo", ["correction=token_tis"]),
        ("dapo", SEQUENCES),
        ("dapo", ["rejection=seq_mean_k3", "rejection_max=0.04"]),
        ("grpo", ["off_policy_mask_threshold=0.01"]),
        ("clip_cov", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "|".join(value[:1]),
)
def test_later_updates_compare_with_the_first(
    script, policy, rollout, config, loss: str, options: list[str]
) -> None:
    """As after a pass of its own for the log-probs, which the first update has anyway."""
    config = dataclasses.replace(
        config, loss=loss, loss_option=options, beta=0.1 if loss == "grpo" else 0.0
    )
    advantages = rollout.advantages.clone()
    advantages[4:8] = 0.0
    noise = 0.3 * torch.randn(rollout.sampler_logps.shape)
    scored = policy.logps(rollout, 1000, 1.0, "torch")
    rollout = dataclasses.replace(
        rollout,
        advantages=advantages,
        sampler_logps=rollout.sampler_logps + noise,
        ref_logps=scored - noise if config.beta else None,
    )
    results = []
    for old in (None, scored):
        learner, seen = with_copy(policy), []
        optimizer = optimizer_of(learner, warmup_steps=0)
        batch = dataclasses.replace(rollout, old_logps=old)
        for _ in range(3):
            batch, metrics = script.update(spy(learner, seen), optimizer, batch, config)
        assert len(seen) == 3
        results.append((weights(learner), metrics))
        entered = rollout.tokens_of(live_completions(rollout, config.loss_config()))
        torch.testing.assert_close(batch.old_logps[entered], scored[entered], atol=2e-5, rtol=0)
    (found, metrics), (expected, whole) = results
    moved = expected - weights(policy)
    assert moved.abs().max() > 1e-3 and (found - expected).norm() < 1e-3 * moved.norm()
    assert abs(whole["approx_kl"]) > 1e-5
    assert metrics == pytest.approx(whole, rel=1e-3, abs=1e-5)


def test_several_updates_take_a_forward_each(script, tmp_path, monkeypatch) -> None:
    forward, seen = Policy.completion_hidden, []
    monkeypatch.setattr(
        Policy, "completion_hidden", lambda *given: seen.append(given) or forward(*given)
    )
    length = Reward("length", lambda completions: [len(text) for text in completions])
    script.main(
        TrainConfig(
            device="cpu", backend="torch", num_prompts=2, num_generations=4, num_iterations=3,
            max_steps=2, warmup_steps=1, eval_size=1, beta=0.0, output_dir=str(tmp_path),
        ),
        dataclasses.replace(arithmetic_task(0, 1), rewards=(length,)),
    )  # fmt: skip
    assert len(seen) == 1 + 2 * 3


def test_the_reference_stays_where_it_was(script, policy, rollout, config) -> None:
    reference = Reference(policy)
    before = policy.logps(rollout, 1000, 1.0, "torch")
    optimizer = optimizer_of(policy)
    script.update(policy, optimizer, rollout, config)
    after = policy.logps(rollout, 1000, 1.0, "torch")
    assert (after - before).abs().max() > 1e-4
    assert torch.equal(reference.logps(rollout, 1000, 1.0, "torch"), before)
    assert torch.equal(policy.logps(rollout, 1000, 1.0, "torch"), after)
    reference.refresh()
    script.update(policy, optimizer, rollout, config)
    assert torch.equal(reference.logps(rollout, 1000, 1.0, "torch"), after)


def test_a_pass_of_the_reference_that_fails_leaves_the_policy(policy, rollout) -> None:
    def fails(model, rollout) -> Tensor:
        raise RuntimeError("no memory")

    broken = dataclasses.replace(policy, layout=Layout("broken", fails, policy.layout.tokens))
    reference = Reference(broken)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.add_(1.0)
    before = weights(policy).clone()
    with pytest.raises(RuntimeError, match="no memory"):
        reference.logps(rollout, 1000, 1.0, "torch")
    assert torch.equal(weights(policy), before)


def test_with_an_adapter_the_reference_is_the_model_without(policy, rollout) -> None:
    policy.model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    trained = {n: p for n, p in policy.model.named_parameters() if "lora_" in n}
    assert {n for n, p in policy.model.named_parameters() if p.requires_grad} == set(trained)
    reference = Reference(policy)
    for parameter in trained.values():
        parameter.data.normal_()
    policy.model.disable_adapters()
    expected = policy.logps(rollout, 1000, 1.0, "torch")
    policy.model.enable_adapters()
    assert (policy.logps(rollout, 1000, 1.0, "torch") - expected).abs().max() > 1e-3
    found = reference.logps(rollout, 1000, 1.0, "torch")
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert sum(p.numel() for p in reference._kept) == sum(p.numel() for p in trained.values())


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 2, [0.5, 1.0, 2 / 3, 1 / 3]),
        ("cosine", 0, [1.0, 0.8535534, 0.5, 0.1464466]),
        ("constant_with_warmup", 2, [0.5, 1.0, 1.0, 1.0]),
        ("constant_with_warmup", 0, [1.0] * 4),
    ],
)
def test_learning_rates_follow_the_schedule(schedule: str, warmup: int, expected) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = MasterAdamW([weight], 1.0, 4, schedule=schedule, warmup_steps=warmup)
    found = []
    for _ in range(4):
        found.append(optimizer.learning_rate)
        optimizer.backward(weight.sum())
        optimizer.step(0.0, 1.0)
    assert found == pytest.approx(expected)


def test_frozen_parameters_have_no_state(policy) -> None:
    first, *others = policy.model.parameters()
    first.requires_grad_(False)
    optimizer = optimizer_of(policy)
    assert all(p is not first for p in optimizer.parameters)
    optimizer.step(0.0, 1.0)
    assert len(optimizer.adamw.state) == len(others)
