"""The policy as it is loaded: nothing random in its passes, and every end of a text known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import (
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fastgrpo.model.own_forward import evaluation_mode
from fastgrpo.train import gsm8k
from fastgrpo.train.chat import chat_prompt
from fastgrpo.train.checkpoint import save_checkpoint
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.model import Policy
from fastgrpo.train.rollout import check_prompts, demonstrate, encode, texts
from fastgrpo.train.run import Run
from fastgrpo.train.sampler import ModelSampler, ends_at
from fastgrpo.train.sampling import Sampling
from fastgrpo.train.tasks import Example, Task, TemplatedPrompt

from .conftest import policy_in

ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=128, **ENDS)
    )


def falcon() -> PreTrainedModel:
    """Reads dropout from its config in every forward."""
    return FalconForCausalLM(
        FalconConfig(
            vocab_size=258,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_dropout=0.3,
            attention_dropout=0.3,
            **ENDS,
        )
    )


def opt() -> PreTrainedModel:
    """Drops whole layers."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=258,
            hidden_size=32,
            ffn_dim=32,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            layerdrop=0.5,
            **ENDS,
        )
    )


def mixtral() -> PreTrainedModel:
    """Has noise in its router."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            router_jitter_noise=0.3,
            **ENDS,
        )
    )


def loaded(
    folder: Path, model: PreTrainedModel, tokenizer: Path | PreTrainedTokenizerFast, **flags
) -> Policy:
    """The policy of ``model`` beside the tokenizer of another folder."""
    model.save_pretrained(folder)
    if isinstance(tokenizer, Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    tokenizer.save_pretrained(folder)
    return policy_in(folder, **flags)


@pytest.mark.parametrize("make", [gpt2, falcon, opt, mixtral], ids=lambda make: make.__name__)
def test_recomputed_activations_are_those_of_the_sampler(tmp_path, model_folder, make) -> None:
    torch.manual_seed(0)
    policy = loaded(tmp_path, make(), model_folder, gradient_checkpointing=True)
    calls = []
    for layer in policy.model.modules():
        if run := getattr(layer, "_gradient_checkpointing_func", None):
            layer._gradient_checkpointing_func = lambda *a, run=run: calls.append(1) or run(*a)
    rollout = ModelSampler(policy).sample(encode(policy, ["1+2=", "12+34="]), 1, Sampling(8))
    assert not calls  # while sampling the layers keep their cache
    first = policy.completion_hidden(rollout)
    assert len(calls) == 2
    torch.testing.assert_close(policy.completion_hidden(rollout), first, atol=0, rtol=0)
    with evaluation_mode(policy.model):
        torch.testing.assert_close(policy.completion_hidden(rollout), first, atol=1e-6, rtol=0)
    first.sum().backward()
    assert policy.model.get_input_embeddings().weight.grad.any()


def test_dropout_of_the_saved_config_is_the_models_own(tmp_path, model_folder) -> None:
    policy = loaded(tmp_path, gpt2(), model_folder, gradient_checkpointing=True)
    assert policy.model.config.resid_pdrop == 0.1
    assert not policy.model.training


def test_a_router_that_wants_a_loss_of_its_own_is_refused(tmp_path, model_folder) -> None:
    model = mixtral()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="model: expected output_router_logits false .* got true"):
        loaded(tmp_path, model, model_folder)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_checkpoint_keeps_what_the_loop_does_not_use(tmp_path, model_folder, lora_rank) -> None:
    """How a model samples by itself, and on which side its tokenizer pads."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="right")
    loaded(tmp_path / "first", llama(258, **ENDS), tokenizer)
    path = tmp_path / "first" / "generation_config.json"
    # At odds with each other, as in folders on the hub: transformers loads, but never saves, them.
    defaults = json.loads(path.read_text()) | {"temperature": 0.6, "do_sample": False, "top_k": 20}
    path.write_text(json.dumps(defaults))
    policy = policy_in(tmp_path / "first", lora_rank=lora_rank)
    save_checkpoint(policy, tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.temperature, saved.do_sample, saved.top_k) == (0.6, False, 20)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").padding_side == "right"


def letters(special: tuple[str, ...] = (), **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer of <s>, </s>, <pad>, <end>, ``special`` and single ASCII characters."""
    tokens = ["<s>", "</s>", "<pad>", "<end>", *special, *map(chr, range(32, 127)), "\n"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    if "bos_token" in names:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", *special]})
    return tokenizer


def llama(rows: int = 128, **ids: int | list[int] | None) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **ids},
        )
    )


@pytest.mark.parametrize(
    ("tokenizers", "models", "ends"),
    [
        ("<end>", 1, [3, 1]),
        ("</s>", [3, 1], [1, 3]),
        ("</s>", None, [1]),
        (None, [3, 1], [3, 1]),
    ],
)
def test_a_text_ends_where_tokenizer_or_model_say(
    tmp_path, tokenizers: str | None, models: int | list[int] | None, ends: list[int]
) -> None:
    names = {"pad_token": "<pad>"} | ({"eos_token": tokenizers} if tokenizers else {})
    policy = loaded(tmp_path, llama(eos_token_id=models), letters(**names))
    assert policy.end_ids == ends == policy.model.generation_config.eos_token_id
    shown = demonstrate(policy, ["q"], ["a"]).token_ids
    assert shown[-1] == ends[0]
    assert ends_at(torch.cat((shown, shown))[None], torch.tensor(ends)).sum() == 2
    weight = policy.model.get_output_embeddings().weight.data
    for end in ends:  # the model says nothing else
        weight.zero_()
        weight[end] = policy.model.base_model(torch.tensor([[5]])).last_hidden_state[0, -1]
        rollout = ModelSampler(policy).sample(encode(policy, ["%"]), 1, Sampling(4, 0.0))
        assert rollout.token_ids.tolist() == [end] and rollout.finished.all()


def test_no_end_of_sequence_token_at_all_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="model: expected an end-of-sequence token, .* got none"):
        loaded(tmp_path, llama(), letters(pad_token="<pad>"))


def test_without_a_pad_token_the_first_end_pads(tmp_path) -> None:
    policy = loaded(tmp_path, llama(eos_token_id=[3, 1]), letters())
    assert policy.tokenizer.pad_token_id == 3


CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [None, CHAT, CHAT.replace("{{ bos_token }}", "")])
def test_special_tokens_are_written_once(tmp_path, template: str | None) -> None:
    """By the tokenizer, unless a template wrote the prompt: it may do without a BOS."""
    tokenizer = letters(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    policy = loaded(tmp_path, llama(), tokenizer)
    raw, built = "1+1=", chat_prompt(policy.tokenizer, gsm8k.messages("1+1="))
    encoded = encode(policy, [raw, built])
    counts = [(ids == 0).sum() for ids in encoded]
    assert counts == [1, 1 if template in (None, CHAT) else 0]
    for ids, text in zip(encoded, (raw, built), strict=True):
        assert policy.tokenizer.decode(ids).removeprefix("<s>") == text.removeprefix("<s>")


def test_rewards_see_every_token_but_end_and_padding(tmp_path) -> None:
    tokenizer = letters(gsm8k.TAGS, eos_token="</s>", pad_token="<pad>")
    policy = loaded(tmp_path, llama(eos_token_id=[1, 3]), tokenizer)
    shown = ["<reasoning>r</reasoning>\n<answer>18</answer>", "a  b<s>", "", "1<pad>2"]
    rollout = demonstrate(policy, ["q"] * 4, shown)
    assert texts(policy, rollout) == shown
    text = texts(policy, rollout)[0]
    assert gsm8k.correctness_reward(text, "18") == 2.0
    assert gsm8k.format_reward(text) == pytest.approx(0.8)
    assert rollout.token_ids[0] == len(["<s>", "</s>", "<pad>", "<end>"])  # one token
    other = rollout.token_ids.masked_fill(rollout.token_ids == 1, 3)
    assert texts(policy, dataclasses.replace(rollout, token_ids=other)) == shown
    cut = rollout[torch.tensor([1])]
    unfinished = dataclasses.replace(cut, token_ids=cut.token_ids[:3], lengths=torch.tensor([3]))
    assert texts(policy, unfinished) == ["a  "]


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("pad", {"pad_token": "<end>", "eos_token": "</s>"}),
        ("end", {"pad_token": "<pad>", "eos_token": "<end>"}),
    ],
)
def test_a_token_without_a_row_is_refused(tmp_path, role: str, names: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=rf"the {role} token .* below 3.*<end>.*\[3\]"):
        loaded(tmp_path, llama(rows=3), letters(**names))


def test_an_end_of_the_generation_config_needs_a_row_too(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the end token .* below 50.*\[60\]"):
        tokenizer = letters(pad_token="<pad>", eos_token="</s>")
        loaded(tmp_path, llama(50, eos_token_id=[1, 60]), tokenizer)


def test_a_tokenizer_may_have_tokens_that_no_text_uses(tmp_path) -> None:
    """Gemma 3's has one more than the 1B model has rows."""
    tokenizer = letters(pad_token="<pad>", eos_token="</s>")
    assert loaded(tmp_path, llama(len(tokenizer) - 1), tokenizer).end_ids == [1]


@pytest.fixture
def short_sighted(tmp_path) -> Policy:
    """A policy with a context of 64 tokens, and no row for a newline."""
    tokenizer = letters(bos_token="<s>", pad_token="<pad>", eos_token="</s>")
    return loaded(tmp_path / "model", llama(len(tokenizer) - 1), tokenizer)


def test_prompts_fit_into_the_context_with_their_completions(short_sighted) -> None:
    fits = "7" * 53  # with BOS and 10 tokens of a completion: 64
    check_prompts(short_sighted, ["1", fits, TemplatedPrompt(fits + "7")], 10)
    with pytest.raises(ValueError, match="1 to 54 tokens, the model's context of 64 .* got 55 in"):
        check_prompts(short_sighted, ["1", fits + "7"], 10)
    with pytest.raises(ValueError, match="1 to 53 tokens.* max_completion_length 11, got 54"):
        check_prompts(short_sighted, ["1", fits], 11)
    with pytest.raises(ValueError, match="got 0 in ''"):
        check_prompts(short_sighted, [TemplatedPrompt("")], 10)
    with pytest.raises(ValueError, match="max_completion_length: .* context of 64, got 64"):
        check_prompts(short_sighted, ["1"], 64)


def test_a_prompt_needs_rows_for_its_tokens(short_sighted) -> None:
    with pytest.raises(ValueError, match=r"token ids below 99, .* got 99 in '1\\n2'"):
        check_prompts(short_sighted, ["1", "1\n2"], 10)


def test_a_run_checks_its_prompts_before_it_writes(short_sighted, tmp_path) -> None:
    config = TrainConfig(output_dir=str(tmp_path / "run"), max_completion_length=60)
    example, long = Example("1+1=", "2"), Example("1" * 10, "2")
    for task in (Task("a", [example], [long], ()), Task("a", [long], [], ())):
        with (
            pytest.raises(ValueError, match="prompts: expected 1 to 4 tokens"),
            Run(config, short_sighted, ModelSampler(short_sighted), task),
        ):
            pass
    assert not (tmp_path / "run").exists()
