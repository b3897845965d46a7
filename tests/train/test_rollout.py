"""Sampling and scoring see the same tokens, the same distribution and no padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastgrpo
from fastgrpo.train.completions import left_padded
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.load import load_policy
from fastgrpo.train.rollout import demonstrate, encode, ends_at, generate, texts


def naive_logps(policy, rollout, temperature: float) -> torch.Tensor:
    """The model's own log-softmax, each sequence alone and without any padding."""
    found = []
    for i, completion in zip(rollout.prompt_index, rollout.completions(), strict=True):
        prompt = rollout.prompts[i]
        with torch.no_grad():
            logits = policy.model(input_ids=torch.cat((prompt, completion))[None]).logits[0]
        logps = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        found.append(logps.gather(-1, completion[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.filterwarnings("ignore:max_tokens_per_microbatch")
@pytest.mark.parametrize("max_tokens", [1, 60, 1000], ids=["one", "uneven", "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_the_models_own(policy, rollout, max_tokens: int, temperature: float) -> None:
    logps = policy.logps(rollout, max_tokens, temperature, "torch")
    torch.testing.assert_close(logps, naive_logps(policy, rollout, temperature), atol=2e-5, rtol=0)


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


def test_ends_at_takes_any_of_several_end_tokens() -> None:
    ids = torch.tensor([[5, 1, 2, 5], [2, 2, 5, 5], [5, 5, 5, 5]])
    expected = [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert ends_at(ids, torch.tensor([1, 2])).tolist() == expected


def test_greedy_completions_do_not_depend_on_the_padding_beside_them(policy) -> None:
    alone = generate(policy, ["1+2="], 6, temperature=0.0)
    beside = generate(policy, ["1+2=", "12345+67890="], 6, temperature=0.0)
    assert texts(policy, alone)[0] == texts(policy, beside)[0]


def test_sampling_follows_the_temperature(policy) -> None:
    """First tokens of many samples have the frequencies that the scored distribution says."""
    torch.manual_seed(0)
    count, temperature = 4000, 1.5
    rollout = generate(policy, ["1+2="], 1, temperature, num_generations=count)
    with torch.no_grad():
        logits = policy.model(input_ids=encode(policy, ["1+2="])[0][None]).logits[0, -1]
    probs = (logits / temperature).softmax(-1)
    seen = torch.bincount(rollout.token_ids, minlength=len(probs)) / count
    assert ((seen - probs).abs() <= 4.5 * (probs * (1 - probs) / count).sqrt() + 1e-3).all()


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
    policy = load_policy(TrainConfig(model=str(model_folder), device="cpu", backend="torch"))
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
