"""Sampling and scoring see the same tokens, the same distribution and no padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastgrpo
from fastgrpo.train.completions import concatenate, left_padded
from fastgrpo.train.metrics import sampler_gap
from fastgrpo.train.rollout import demonstrate, texts

from .conftest import own_logps, policy_in


@pytest.mark.filterwarnings("ignore:max_tokens_per_microbatch")
@pytest.mark.parametrize("max_tokens", [1, 60, 1000], ids=["one", "uneven", "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_the_models_own(policy, rollout, max_tokens: int, temperature: float) -> None:
    logps = policy.logps(rollout, max_tokens, temperature, "torch")
    expected = own_logps(policy.model, rollout, temperature)
    torch.testing.assert_close(logps, expected, atol=2e-5, rtol=0)


def test_completions_end_with_eos_or_were_cut(policy, rollout) -> None:
    assert len(rollout.lengths.unique()) > 1 and rollout.finished.any()
    for ids, finished in zip(rollout.completions(), rollout.finished, strict=True):
        ends = (ids == policy.tokenizer.eos_token_id).nonzero()[:, 0].tolist()
        assert ends == ([len(ids) - 1] if finished else [])
        assert finished or len(ids) == 8


def test_a_group_is_a_prompt_with_its_completions(policy, rollout) -> None:
    assert [policy.tokenizer.decode(ids) for ids in rollout.prompts] == ["1+2=", "34+56=", "7+10="]
    assert rollout.prompt_index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert rollout.cu_seqlens.tolist() == [0, *rollout.lengths.cumsum(0).tolist()]
    assert len(rollout.token_ids) == rollout.cu_seqlens[-1]
    assert rollout.completion_mask.sum(dim=1).tolist() == rollout.lengths.tolist()


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = left_padded([torch.tensor([5, 6, 7]), torch.tensor([8])], padding=2)
    assert ids.tolist() == [[5, 6, 7], [2, 2, 8]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]


def test_rollouts_that_are_put_together_are_the_whole(policy, rollout) -> None:
    parts = [rollout[torch.tensor(chosen)] for chosen in ([0, 1, 2, 3], [4, 5, 6, 7, 8], [9, 11])]
    whole, expected = concatenate(parts), rollout[torch.tensor([*range(10), 11])]
    assert whole.prompt_index.tolist() == [0] * 4 + [1] * 4 + [2] + [3] * 2
    assert [p.tolist() for p in whole.prompts] == [
        rollout.prompts[i].tolist() for i in (0, 1, 2, 2)
    ]
    for name in ("token_ids", "lengths", "finished", "sampler_logps", "advantages"):
        assert torch.equal(getattr(whole, name), getattr(expected, name))
    assert whole.old_logps is None
    scored = dataclasses.replace(parts[0], old_logps=parts[0].sampler_logps)
    assert concatenate([scored, parts[1]]).old_logps is None


def test_live_groups_have_an_advantage(rollout) -> None:
    advantages = torch.tensor([0.0, 0, 0, 0, 0, 0, 1e-8, 0, -1, 1, 0, 0])
    rollout = dataclasses.replace(rollout, advantages=advantages)
    assert rollout.live_groups.tolist() == [False, True, True]


def test_the_gap_to_the_sampler(rollout) -> None:
    """Of the first forward: later ones have moved away from old_logps, which is from it."""
    moved = rollout.sampler_logps + 0.5
    moved[0] -= 0.25
    gap = sampler_gap(moved, rollout)
    count = len(moved)
    assert gap["sampler_gap_mean"].item() == pytest.approx(0.5 - 0.25 / count, abs=1e-5)
    assert gap["sampler_gap_max"].item() == pytest.approx(0.5, abs=1e-5)
    assert gap["sampler_gap_mean_count"] == count
    later = dataclasses.replace(rollout, old_logps=rollout.sampler_logps - 0.125)
    assert sampler_gap(moved, later)["sampler_gap_max"].item() == pytest.approx(0.125, abs=1e-5)
    holes = rollout.sampler_logps.index_fill(0, torch.tensor([0]), float("nan"))
    part = sampler_gap(moved, dataclasses.replace(rollout, sampler_logps=holes))
    assert part["sampler_gap_mean_count"] == count - 1
    assert part["sampler_gap_mean"].item() == pytest.approx(0.5, abs=1e-5)
    assert sampler_gap(moved, dataclasses.replace(rollout, sampler_logps=None)) == {}


def test_chosen_completions_keep_all_that_is_theirs(policy, rollout) -> None:
    rollout = dataclasses.replace(rollout, old_logps=policy.logps(rollout, 1000, 1.0, "torch"))
    logps = rollout.old_logps.split(rollout.lengths.tolist())
    seen = []
    for chosen in torch.randperm(12).split(5):
        chosen = chosen.sort().values
        part, seen = rollout[chosen], seen + chosen.tolist()
        assert torch.equal(part.advantages, rollout.advantages[chosen])
        assert torch.equal(part.finished, rollout.finished[chosen])
        assert len(part.prompts) == len(rollout.prompt_index[chosen].unique())
        for k, i in enumerate(chosen.tolist()):
            assert torch.equal(part.completions()[k], rollout.completions()[i])
            assert torch.equal(
                part.prompts[part.prompt_index[k]], rollout.prompts[rollout.prompt_index[i]]
            )
            start = part.cu_seqlens[k]
            assert torch.equal(part.old_logps[start : part.cu_seqlens[k + 1]], logps[i])
    assert sorted(seen) == list(range(12))


def test_demonstrations_are_the_given_text(policy) -> None:
    rollout = demonstrate(policy, ["1+2=", "50+50="], ["3", "100"])
    assert texts(policy, rollout) == ["3", "100"]
    assert rollout.lengths.tolist() == [2, 4] and rollout.finished.all()
    assert (rollout.token_ids[[1, 5]] == policy.tokenizer.eos_token_id).all()


def test_a_folders_sampling_defaults_are_not_inherited(model_folder) -> None:
    policy = policy_in(model_folder)
    defaults = policy.model.generation_config
    assert (defaults.repetition_penalty, defaults.top_k, defaults.do_sample) == (None, None, None)
    assert (defaults.eos_token_id, defaults.pad_token_id) == ([1], 0)


@pytest.mark.parametrize(
    "field", [{"logits_scaling": 4.0}, {"final_logit_softcapping": 0.5}], ids=["scale", "softcap"]
)
def test_a_head_that_the_model_does_not_have_is_refused(policy, field: dict[str, float]) -> None:
    """Qwen2 ignores these fields, so the head that they describe is not its own."""
    policy.model.config.update(field)
    with pytest.raises(fastgrpo.UnsupportedHeadError, match="within .* nats of its own forward"):
        fastgrpo.head_of(policy.model)
