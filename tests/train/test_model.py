"""The policy as it is loaded: nothing random in its passes, one end of a text, ids that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from fastgrpo.model.fused_lm import evaluation_mode
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.model import Policy, load_policy
from fastgrpo.train.rollout import generate

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


def loaded(folder: Path, model: PreTrainedModel, tokenizer_folder: Path, **flags) -> Policy:
    """The policy of ``model`` beside the tokenizer of another folder."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return load_policy(TrainConfig(model=str(folder), device="cpu", backend="torch", **flags))


@pytest.mark.parametrize("make", [gpt2, falcon, opt, mixtral], ids=lambda make: make.__name__)
def test_recomputed_activations_are_those_of_the_sampler(tmp_path, model_folder, make) -> None:
    torch.manual_seed(0)
    policy = loaded(tmp_path, make(), model_folder, gradient_checkpointing=True)
    calls = []
    for layer in policy.model.modules():
        if run := getattr(layer, "_gradient_checkpointing_func", None):
            layer._gradient_checkpointing_func = lambda *a, run=run: calls.append(1) or run(*a)
    rollout = generate(policy, ["1+2=", "12+34="], 8, temperature=1.0)
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
