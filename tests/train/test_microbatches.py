"""What enters the model: within the budget, whole groups, and nothing that has no gradient."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor

import fastgrpo
from fastgrpo import LossConfig
from fastgrpo.objective.presets import PRESETS
from fastgrpo.train.completions import Rollout
from fastgrpo.train.layouts import LAYOUTS
from fastgrpo.train.microbatches import live_completions, micro_batches, step_normalizer

GROUPS = [(10, [5, 9, 2, 7]), (3, [4, 4]), (20, [6, 30, 1]), (8, [3])]
SHARED = LAYOUTS["shared"]


@pytest.fixture
def rollout() -> Rollout:
    torch.manual_seed(0)
    lengths = [n for _, completions in GROUPS for n in completions]
    return Rollout(
        prompts=tuple(torch.randint(50, (n,)) for n, _ in GROUPS),
        prompt_index=torch.tensor([i for i, (_, c) in enumerate(GROUPS) for _ in c]),
        token_ids=torch.randint(50, (sum(lengths),)),
        lengths=torch.tensor(lengths),
        finished=torch.ones(len(lengths), dtype=torch.bool),
    )


def everything(rollout: Rollout) -> Tensor:
    return torch.arange(len(rollout))


def forwarded(rollout: Rollout, name: str) -> int:
    """How many token ids a layout gives a model that has no layers."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = torch.nn.Identity()

    model = Model()
    seen = []

    def forward(input_ids: Tensor, **_: object) -> object:
        seen.append(input_ids.numel())
        hidden = torch.zeros(*input_ids.shape, 1)
        return type("Output", (), {"last_hidden_state": hidden})

    model.base_model.forward = forward
    LAYOUTS[name].hidden(model, rollout)
    return sum(seen)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("budget", [50, 60, 100, 1000])
def test_a_budget_is_what_the_layout_really_forwards(rollout, name: str, budget: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = micro_batches(rollout, everything(rollout), budget, LAYOUTS[name])
    for chosen in batches:
        assert torch.equal(chosen, chosen.sort().values)
        assert forwarded(rollout[chosen], name) <= budget
    assert torch.equal(torch.cat(batches).sort().values, everything(rollout))
    assert (len(batches) == 1) == (forwarded(rollout, name) <= budget)


def test_groups_that_fit_stay_whole_and_others_are_split(rollout) -> None:
    batches = micro_batches(rollout, everything(rollout), 50, SHARED)
    for group in ([0, 1, 2, 3], [4, 5], [9]):
        assert any(set(group) <= set(chosen.tolist()) for chosen in batches)
    (longest,) = [chosen for chosen in batches if 7 in chosen]
    assert 6 not in longest  # 20 + 29 + 5 tokens


def test_a_completion_beyond_the_budget_stands_alone_and_is_said(rollout) -> None:
    with pytest.warns(UserWarning, match="max_tokens_per_microbatch: 40 tokens do not hold"):
        batches = micro_batches(rollout, everything(rollout), 40, SHARED)
    assert [7] in [chosen.tolist() for chosen in batches]
    assert micro_batches(rollout, everything(rollout)[:0], 40, SHARED) == []


@pytest.mark.filterwarnings("ignore:max_tokens_per_microbatch")
@pytest.mark.parametrize(
    ("loss", "sizes"),
    [
        (LossConfig.preset("clip_cov"), {10}),
        (LossConfig(top_entropy_quantile=0.2), {10}),
        (LossConfig(aggregation="prompt_mean"), {4, 2, 3, 1}),
    ],
    ids=["batch statistics", "entropy quantile", "prompts"],
)
def test_what_a_loss_compares_is_forwarded_together(rollout, loss, sizes: set[int]) -> None:
    batches = micro_batches(rollout, everything(rollout), 1, SHARED, loss)
    assert {len(chosen) for chosen in batches} == sizes


LOSSES = {name: LossConfig.preset(name) for name in PRESETS} | {
    "kl": LossConfig(beta=0.1),
    "entropy bonus": LossConfig(entropy_coef=0.1),
    "entropy quantile": LossConfig(top_entropy_quantile=0.5),
    "prompt_mean": LossConfig(aggregation="prompt_mean"),
    "token_tis": LossConfig(correction="token_tis"),
    "seq_mask_tis": LossConfig(
        correction="seq_mask_tis", correction_min=0.5, correction_max=1.5, ratio_level="sequence"
    ),
    "rejection": LossConfig(rejection="seq_mean_k3", rejection_max=0.04),
    "off-policy mask": LossConfig(off_policy_mask_threshold=0.01),
    "clamped": LossConfig(log_ratio_clamp=0.1, ratio_level="sequence_sum"),
}
# With a KL, an entropy bonus, a pull towards the sampler, or statistics of the batch.
ALL_MATTER = {
    "lmbook", "nemo_grpo", "dsv32", "kl", "entropy bonus", "entropy quantile",
    "prime_dppo", "ipo", "dro", "clip_cov", "kl_cov",
}  # fmt: skip


def gradients(rollout: Rollout, chosen: Tensor, loss: LossConfig, normalizer, on_policy: bool):
    """The loss, and its gradients in the chosen completions' hidden states and in the head."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = draw(len(rollout.token_ids), 8).requires_grad_()
    weight = (0.5 * draw(50, 8)).requires_grad_()
    tokens = rollout.tokens_of(chosen)
    batch = rollout[chosen]
    logps = (hidden @ weight.t()).log_softmax(-1)
    logps = logps.gather(-1, rollout.token_ids[:, None])[:, 0].detach()
    old, ref, sampler = (logps + 0.2 * draw(len(logps)) for _ in range(3))
    out = fastgrpo.grpo_loss(
        hidden[tokens],
        weight,
        batch.token_ids,
        None,
        batch.advantages,
        cu_seqlens=batch.cu_seqlens,
        old_logps=None if on_policy else old[tokens],
        ref_logps=ref[tokens],
        sampler_logps=sampler[tokens],
        group_ids_or_size=batch.prompt_index if loss.aggregation == "prompt_mean" else None,
        normalizer=normalizer,
        config=dataclasses.replace(loss, max_completion_length=30)
        if loss.aggregation == "fixed_length"
        else loss,
        seed=0 if loss.rule.context == "drawn_covariance" else None,
        backend="torch",
    )
    out.loss.backward()
    return out.loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("on_policy", [False, True], ids=["stale", "on-policy"])
@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_enter_has_no_gradient(rollout, name: str, on_policy: bool) -> None:
    """A group without advantage, and single completions: exactly nothing changes without them."""
    advantages = torch.tensor([1.0, -0.5, 0.0, -0.5, 0.0, 0.0, 1.5, 0.0, -1.5, 0.0])
    rollout = dataclasses.replace(rollout, advantages=advantages.double())
    loss = LOSSES[name]
    if loss.aggregation == "fixed_length":
        loss = dataclasses.replace(loss, max_completion_length=30)
    live = live_completions(rollout, loss)
    if name in ALL_MATTER:
        assert live.tolist() == list(range(10))
        return
    kept = [0, 1, 2, 3, 6, 7, 8] if name == "prompt_mean" else [0, 1, 3, 6, 8]
    assert live.tolist() == kept
    normalizer = step_normalizer(rollout, loss)
    whole = gradients(rollout, everything(rollout), loss, normalizer, on_policy)
    part = gradients(rollout, live, loss, normalizer, on_policy)
    for found, expected in zip(part, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-12)
    outside = ~rollout.tokens_of(live)
    assert not whole[1][outside].any() and whole[1].any()


def test_an_advantage_that_is_no_number_enters(rollout) -> None:
    advantages = torch.zeros(10)
    advantages[4] = float("nan")
    rollout = dataclasses.replace(rollout, advantages=advantages)
    assert live_completions(rollout, LossConfig()).tolist() == [4]
