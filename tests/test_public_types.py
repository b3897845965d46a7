"""The types of the public functions: `make check` type-checks this file, and pytest runs it.

The type checker reports an unused `ignore` as an error, so it must refuse the wrong calls here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from typing_extensions import assert_type

import fastgrpo
import fastgrpo_kernels
from fastgrpo import (
    FusedGRPOLoss,
    GRPOLoss,
    LossConfig,
    SelectedLogps,
    Support,
    TokenLogps,
    torch_kernels,
)
from fastgrpo.backend import Kernels
from fastgrpo.head.held import AnchoredExponentials, Held, Probabilities, RawLogits
from fastgrpo.head.loops import SeparableLoss
from fastgrpo.head.routes import Loss, _SumOfLogps
from fastgrpo.objective.policy import Objective, PolicyLoss

HIDDEN = torch.linspace(-1, 1, 2 * 3 * 4).view(2, 3, 4)
WEIGHT = torch.linspace(-1, 1, 5 * 4).view(5, 4)
IDS = torch.tensor([[0, 1, 2], [3, 4, 0]])
MASK = torch.ones(2, 3, dtype=torch.bool)
REWARDS = torch.tensor([1.0, 0.0])


def test_losses():
    config = LossConfig.preset("dapo", beta=0.04)
    assert_type(config, LossConfig)
    out = fastgrpo.grpo_loss(
        HIDDEN, WEIGHT, IDS, MASK, REWARDS, ref_logps=torch.zeros(2, 3), config=config
    )
    assert_type(out, GRPOLoss)
    assert_type(out.loss, Tensor)
    assert_type(out.logps, Tensor)
    assert_type(out.entropy, Tensor | None)
    assert_type(out.metrics, dict[str, Tensor])
    assert_type(LossConfig(surrogate="cispo", epsilon_high=4.0).epsilon_high, float)
    module = FusedGRPOLoss("grpo", temperature=0.7)
    assert_type(module.forward(HIDDEN, WEIGHT, IDS, MASK, REWARDS), GRPOLoss)
    assert_type(module.config, LossConfig)
    assert_type(fastgrpo.count_normalizer([MASK, MASK], config), Tensor)
    assert_type(fastgrpo.default_workspace_mb(5, "cpu"), float)
    with fastgrpo.checked() as nothing:
        assert_type(nothing, None)


def test_log_probs():
    out = fastgrpo.linear_logps(HIDDEN, WEIGHT, IDS, entropy="detached", backend="torch")
    assert_type(out, TokenLogps)
    logps, entropy, lse = out
    assert_type(logps, Tensor)
    assert_type(entropy, Tensor | None)
    assert_type(lse, Tensor)
    several = fastgrpo.selected_logps(HIDDEN, WEIGHT, IDS[..., None], temperature=0.7)
    assert_type(several, SelectedLogps)
    assert_type(several.sum_squares, Tensor)


def test_supports():
    support = Support.of_mask(torch.eye(5, dtype=torch.bool)[IDS])
    assert_type(support, Support)
    assert_type(Support.of_lists([[0, 1], torch.tensor([2])]).counts, Tensor)
    kept = Support.of_logits(HIDDEN @ WEIGHT.T, temperature=0.7, top_p=0.9).select(slice(1))
    assert_type(Support.cat([kept, support.view(6).view(2, 3)]).to("cpu"), Support)
    assert_type(fastgrpo.linear_logps(HIDDEN, WEIGHT, IDS, support=support).logps, Tensor)


def test_advantages_and_rewards():
    advantages = fastgrpo.group_advantages(REWARDS, 2)
    assert_type(advantages, Tensor | tuple[Tensor, Tensor])
    tokens = fastgrpo.token_rewards(REWARDS, MASK)
    assert_type(tokens, Tensor)
    assert_type(fastgrpo.reinforce_plus_plus(tokens, MASK), Tensor)
    old = torch.zeros(2, 3)
    assert_type(fastgrpo.kl_penalty(old, old, MASK), Tensor)
    assert_type(fastgrpo.rejection_mask(old, old, MASK, "token_k1", rejection_max=2.0), Tensor)
    assert_type(fastgrpo.length_penalty(REWARDS, IDS.sum(1), 2), Tensor)
    assert_type(
        fastgrpo.soft_overlong_punishment(IDS.sum(1), max_completion_length=4, cache_length=2),
        Tensor,
    )
    assert_type(fastgrpo.mask_truncated_completions(MASK, IDS, eos_token_ids=[4]), Tensor)


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="entropy"):
        fastgrpo.linear_logps(HIDDEN, WEIGHT, IDS, entropy="all")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="backend"):
        fastgrpo.grpo_loss(HIDDEN, WEIGHT, IDS, MASK, REWARDS, backend="cuda")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(TypeError, match="temprature"):
        fastgrpo.grpo_loss(HIDDEN, WEIGHT, IDS, MASK, REWARDS, temprature=1.0)  # pyrefly: ignore[unexpected-keyword]
    with pytest.raises(ValueError, match="epsilon"):
        LossConfig(epsilon=0.2)  # pyrefly: ignore[unexpected-keyword]


def test_what_implements_a_protocol():
    """The checker compares every member; at run time there is nothing left to see."""
    backends: tuple[Kernels, Kernels] = (fastgrpo_kernels, torch_kernels)
    held: tuple[type[Held], ...] = (RawLogits, Probabilities, AnchoredExponentials)
    losses: tuple[type[SeparableLoss], ...] = (_SumOfLogps, Objective)
    whole: type[Loss[PolicyLoss]] = Objective
    assert len(backends) == 2 and len(held) == 3 and whole in losses
