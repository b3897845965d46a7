"""What the sampler draws: generate's tokens, one reading per prompt, the same in any batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import fastgrpo
from fastgrpo.train import kv_cache
from fastgrpo.train.completions import Rollout, left_padded
from fastgrpo.train.model import Policy
from fastgrpo.train.sampler import ModelSampler, ends_at
from fastgrpo.train.sampling import Sampling, choose, uniforms_of

from .conftest import own_logps

ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # such that a wrong position or key shows
}


def gpt2() -> PreTrainedModel:
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ENDS, initializer_range=0.3))


def gemma3() -> PreTrainedModel:
    """Two of three layers see the last five tokens only."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    sliding = {"head_dim": 8, "sliding_window": 5, "layer_types": layers}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **sliding, **ENDS))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **ENDS))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **ENDS))


def mamba() -> PreTrainedModel:
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**sizes, **ENDS))


MODELS = [qwen2, llama, gemma3, gpt2]
PROMPTS = tuple(torch.arange(length) * 7 % 53 + 2 + length % 3 for length in (3, 14, 1, 4, 13, 40))


def policy_of(policy: Policy, make, dtype: torch.dtype = torch.float32) -> Policy:
    """A random model beside the tokenizer of another policy: pad is 0 and end is 1 in both."""
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=[1, 7])
    return Policy(model, policy.tokenizer, fastgrpo.head_of(model))


def greedy_by_generate(policy: Policy, prompts: tuple[Tensor, ...], length: int) -> list[list[int]]:
    ids, mask = left_padded(prompts, 0)
    found = policy.model.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=length, do_sample=False
    )[:, ids.shape[1] :]
    ends = ends_at(found, torch.tensor(policy.end_ids))
    return [row[keep].tolist() for row, keep in zip(found, ends, strict=True)]


def completions(rollout: Rollout) -> list[list[int]]:
    return [ids.tolist() for ids in rollout.completions()]


def reads(model: PreTrainedModel) -> list[tuple[int, int]]:
    """A list that gets the (rows, tokens) of every forward from now on."""
    shapes = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return shapes


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_greedy_tokens_are_those_of_generate(policy, capsys, make) -> None:
    policy = policy_of(policy, make)
    free = greedy_by_generate(policy, PROMPTS, 24)
    policy.model.generation_config.eos_token_id = [1, max(free, key=len)[9]]
    rollout = ModelSampler(policy).sample(PROMPTS, 2, Sampling(24, temperature=0.0))
    expected = greedy_by_generate(policy, PROMPTS, 24)
    assert completions(rollout) == [row for row in expected for _ in range(2)]
    assert len({len(row) for row in expected}) > 1  # some end, some are cut
    assert not capsys.readouterr().err  # its own cache did it


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_logps_are_those_of_separate_passes(policy, make, temperature: float) -> None:
    policy = policy_of(policy, make)
    rollout = ModelSampler(policy).sample(PROMPTS, 3, Sampling(24, temperature, seed=(3,)))
    expected = own_logps(policy.model, rollout, temperature)
    torch.testing.assert_close(rollout.sampler_logps, expected, atol=5e-5, rtol=0)


def test_samples_do_not_depend_on_what_stands_beside_them(policy) -> None:
    policy = policy_of(policy, qwen2)
    sampler, sampling = ModelSampler(policy), Sampling(24, seed=(5, 2))
    together = completions(sampler.sample(PROMPTS, 3, sampling))
    assert len({tuple(row) for row in together}) > 12
    order = [4, 0, 5, 2, 1, 3]
    shuffled = completions(sampler.sample([PROMPTS[i] for i in order], 3, sampling))
    for i, prompt in enumerate(PROMPTS):
        group = together[3 * i : 3 * i + 3]
        place = order.index(i)
        assert completions(sampler.sample([prompt], 3, sampling)) == group
        assert completions(sampler.sample([prompt], 1, sampling)) == group[:1]
        assert shuffled[3 * place : 3 * place + 3] == group
    other = completions(sampler.sample(PROMPTS, 3, dataclasses.replace(sampling, seed=(5, 3))))
    assert sum(a == b for a, b in zip(together, other, strict=True)) < 4


def test_a_longer_bound_changes_no_token_before_it(policy) -> None:
    sampler = ModelSampler(policy_of(policy, qwen2))
    short, long = (sampler.sample(PROMPTS, 2, Sampling(length)) for length in (5, 24))
    assert completions(short) == [row[:5] for row in completions(long)]


def test_equal_prompts_have_completions_of_their_own() -> None:
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    drawn = uniforms_of(prompts, 4, Sampling(6))
    assert drawn.shape == (12, 6) and len(drawn.unique()) == 72
    assert drawn.min() >= 0 and drawn.max() < 1


def test_sampling_follows_the_temperature(policy) -> None:
    """First tokens of many samples have the frequencies that the scored distribution says."""
    policy = policy_of(policy, qwen2)
    count, temperature = 4000, 1.5
    rollout = ModelSampler(policy).sample(PROMPTS[:1], count, Sampling(1, temperature))
    with torch.no_grad():
        logits = policy.model(input_ids=PROMPTS[0][None]).logits[0, -1]
    probs = (logits / temperature).softmax(-1)
    seen = torch.bincount(rollout.token_ids, minlength=len(probs)) / count
    assert ((seen - probs).abs() <= 4.5 * (probs * (1 - probs) / count).sqrt() + 1e-3).all()


def test_the_inverse_of_the_cumulative_distribution() -> None:
    scores = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).log().expand(6, 5)
    wanted = [0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53]
    uniforms = torch.tensor(wanted, dtype=torch.float64)
    tokens, logps = choose(scores, uniforms)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logps.exp(), torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25, 0.25]))
    assert choose(scores, None)[0].tolist() == [2] * 6


def test_prompts_are_read_once_and_with_little_padding(policy) -> None:
    policy = policy_of(policy, qwen2)
    sampler = ModelSampler(policy)
    sampler.sample(PROMPTS, 1, Sampling(1))
    shapes = reads(policy.model)
    sampler.sample(PROMPTS, 5, Sampling(1))
    real = sum(map(len, PROMPTS))
    assert real <= sum(rows * length for rows, length in shapes) <= 1.12 * real


def test_finished_rows_leave_the_batch(policy) -> None:
    policy = policy_of(policy, qwen2)
    sampler = ModelSampler(policy)
    sampler.sample(PROMPTS, 1, Sampling(1))
    shapes = reads(policy.model)
    rollout = sampler.sample(PROMPTS, 4, Sampling(40))
    steps = [rows for rows, length in shapes if length == 1][1:]  # the first read a prompt
    assert steps == sorted(steps, reverse=True) and steps[0] == 24 and steps[-1] < 12
    for place, rows in enumerate(steps, start=1):
        unfinished = (rollout.lengths > place).sum()
        assert unfinished <= rows <= unfinished * 8 / 7


def test_the_cache_grows_with_the_completions(policy, monkeypatch, capsys) -> None:
    policy = policy_of(policy, qwen2)
    expected = ModelSampler(policy).sample(PROMPTS, 2, Sampling(24))
    monkeypatch.setattr(kv_cache, "ROOM", 5)
    found = ModelSampler(policy).sample(PROMPTS, 2, Sampling(24))
    assert expected.lengths.max() > 2 * kv_cache.ROOM and not capsys.readouterr().err
    assert completions(found) == completions(expected)


class Forced(LogitsProcessor):
    """Ends every completion at its given length."""

    def __init__(self, lengths: Tensor, end: int) -> None:
        self.lengths, self.end, self.place = lengths, end, 0

    def __call__(self, input_ids: Tensor, scores: Tensor, samples: Tensor) -> Tensor:
        self.place += 1
        ending = self.lengths[samples] == self.place
        is_end = torch.arange(scores.shape[1]) == self.end
        return scores.masked_fill(ending[:, None] != is_end, -torch.inf)


def test_a_processor_knows_its_completions(policy) -> None:
    policy = policy_of(policy, qwen2)
    policy.model.generation_config.eos_token_id = [1]
    lengths = torch.tensor([3, 20, 1, 7, 7, 2, 11, 20, 5, 1, 1, 9])
    forced = LogitsProcessorList([Forced(lengths, 1)])
    rollout = ModelSampler(policy).sample(PROMPTS, 2, Sampling(24, processors=forced))
    assert rollout.lengths.tolist() == lengths.tolist() and rollout.finished.all()


def test_a_wrong_cache_is_found_and_generate_draws_the_same(policy, monkeypatch, capsys) -> None:
    policy = policy_of(policy, qwen2)
    right = ModelSampler(policy).sample(PROMPTS, 3, Sampling(24, 0.8))
    update = kv_cache.RoomyLayer.update

    def forget(self, keys: Tensor, values: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        return update(self, keys, values.zero_(), *args)

    monkeypatch.setattr(kv_cache.RoomyLayer, "update", forget)
    sampler = ModelSampler(policy)
    for _ in range(2):
        fallen = sampler.sample(PROMPTS, 3, Sampling(24, 0.8))
    said = capsys.readouterr().err
    assert said.count("Qwen2ForCausalLM with generate: with its cache a log-prob is") == 1
    assert completions(fallen) == completions(right)
    torch.testing.assert_close(fallen.sampler_logps, right.sampler_logps, atol=2e-5, rtol=0)
    assert torch.equal(fallen.finished, right.finished)


def test_a_recurrent_model_samples_by_generate(policy, capsys) -> None:
    policy = policy_of(policy, mamba)
    prompts = [PROMPTS[0]]
    rollout = ModelSampler(policy).sample(prompts, 2, Sampling(6, temperature=0.0))
    assert "more than keys and values" in capsys.readouterr().err
    assert completions(rollout) == greedy_by_generate(policy, tuple(prompts), 6) * 2


def test_sampling_has_no_dropout_and_leaves_the_mode_alone(policy) -> None:
    policy = policy_of(policy, gpt2)
    sampler = ModelSampler(policy)
    before = completions(sampler.sample(PROMPTS, 2, Sampling(8)))
    policy.model.train()
    assert completions(sampler.sample(PROMPTS, 2, Sampling(8))) == before
    assert policy.model.training and policy.model.transformer.drop.training


def test_bf16_samples_with_fp32_logps(policy, capsys) -> None:
    policy = policy_of(policy, qwen2, torch.bfloat16)
    rollout = ModelSampler(policy).sample(PROMPTS, 2, Sampling(8))
    assert rollout.sampler_logps.dtype == torch.float32 and not capsys.readouterr().err
    scored = policy.logps(rollout, 1000, 1.0, "torch")
    assert (scored - rollout.sampler_logps).abs().mean() < 0.1


def test_ends_at_takes_any_of_several_end_tokens() -> None:
    ids = torch.tensor([[5, 1, 2, 5], [2, 2, 5, 5], [5, 5, 5, 5]])
    expected = [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert ends_at(ids, torch.tensor([1, 2])).tolist() == expected


def test_bad_input_is_named(policy) -> None:
    sampler = ModelSampler(policy)
    for prompts in ([], [PROMPTS[0], PROMPTS[0][:0]]):
        with pytest.raises(ValueError, match="prompts: expected at least one token each, got"):
            sampler.sample(prompts, 1, Sampling(1))
    with pytest.raises(ValueError, match="num_generations: expected at least 1, got 0"):
        sampler.sample(PROMPTS, 0, Sampling(1))
    with pytest.raises(ValueError, match="max_length: expected at least 1, got 0"):
        Sampling(0)
    with pytest.raises(ValueError, match="temperature: expected at least 0, got nan"):
        Sampling(1, temperature=float("nan"))


def test_equal_prompts_of_other_processes_count_as_earlier() -> None:
    prompt, other = torch.tensor([4, 5]), torch.tensor([6])
    alone = uniforms_of([prompt, other, prompt], 2, Sampling(3))
    assert torch.equal(uniforms_of([prompt], 2, Sampling(3, before=(prompt, other))), alone[4:])
    assert not torch.equal(alone[4:], alone[:2])
