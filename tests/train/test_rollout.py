"""Sampling and scoring see the same tokens, the same distribution and no padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastgrpo
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.model import load_policy
from fastgrpo.train.rollout import demonstrate, encode, ends_at, generate, texts


def naive_logps(policy, rollout, temperature: float) -> torch.Tensor:
    """The model's own log-softmax, each sequence alone and without any padding."""
    out = torch.zeros(rollout.completion_ids.shape)
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        completion = rollout.completion_ids[i][rollout.completion_mask[i]]
        with torch.no_grad():
            logits = policy.model(input_ids=torch.cat((prompt, completion))[None]).logits[0]
        logps = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        out[i, : len(completion)] = logps.gather(-1, completion[:, None])[:, 0]
    return out


@pytest.mark.parametrize("micro_batch_size", [1, 5, 12], ids=["one", "uneven", "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_the_models_own(
    policy, rollout, micro_batch_size: int, temperature: float
) -> None:
    logps = policy.logps(rollout, micro_batch_size, temperature, "torch")
    torch.testing.assert_close(logps, naive_logps(policy, rollout, temperature), atol=2e-5, rtol=0)
    assert not logps[~rollout.completion_mask].any()


def test_prompts_are_padded_on_the_left_and_completions_end_with_eos(policy, rollout) -> None:
    assert not rollout.prompt_mask.all() and rollout.prompt_mask[:, -1].all()
    lengths = rollout.completion_mask.sum(dim=1)
    assert len(lengths.unique()) > 1
    for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True):
        ends = (ids[mask] == policy.tokenizer.eos_token_id).nonzero()[:, 0].tolist()
        assert ends in ([], [mask.sum() - 1])


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
    rollout = generate(policy, ["1+2="] * count, 1, temperature)
    ids, mask = encode(policy, ["1+2="])
    with torch.no_grad():
        probs = (
            policy.model(input_ids=ids, attention_mask=mask.long()).logits[0, -1] / temperature
        ).softmax(-1)
    seen = torch.bincount(rollout.completion_ids[:, 0], minlength=len(probs)) / count
    assert ((seen - probs).abs() <= 4.5 * (probs * (1 - probs) / count).sqrt() + 1e-3).all()


def test_selected_rows_lose_only_columns_that_are_padding(policy, rollout) -> None:
    rollout = dataclasses.replace(rollout, old_logps=policy.logps(rollout, 12, 1.0, "torch"))
    for rows in rollout.micro_batches(5):
        part = rollout[rows]
        assert part.completion_mask.any(dim=0).all() and part.prompt_mask.any(dim=0).all()
        assert part.completion_mask.sum() == rollout.completion_mask[rows].sum()
        torch.testing.assert_close(
            part.old_logps, rollout.old_logps[rows][:, : part.old_logps.shape[1]]
        )
        assert torch.equal(part.advantages, rollout.advantages[rows])


def test_demonstrations_are_the_given_text(policy) -> None:
    rollout = demonstrate(policy, ["1+2=", "50+50="], ["3", "100"])
    assert texts(policy, rollout) == ["3", "100"]
    assert rollout.completion_mask.sum(dim=1).tolist() == [2, 4]
    assert (rollout.completion_ids[torch.arange(2), [1, 3]] == policy.tokenizer.eos_token_id).all()


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
