"""Small policies and rollouts for the tests of the training loop."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fastgrpo.packing import rows_of_entries
from fastgrpo.train.arithmetic import arithmetic_task
from fastgrpo.train.completions import Rollout
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.load import load_policy
from fastgrpo.train.model import Policy
from fastgrpo.train.rewards import Reward
from fastgrpo.train.rollout import encode
from fastgrpo.train.sampler import ModelSampler
from fastgrpo.train.sampling import Sampling
from fastgrpo.train.tasks import Task
from support_oracle import whole_where_nothing

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "grpo_train.py"
TINY_RUN = {
    "device": "cpu",
    "backend": "torch",
    "max_steps": 3,
    "warmup_steps": 2,
    "eval_size": 8,
    "num_prompts": 4,
    "num_generations": 4,
    "max_tokens_per_microbatch": 64,
    "eval_every": 2,
}


def policy_in(folder: Path, **flags: object) -> Policy:
    """The policy of a folder or file, on the CPU."""
    return load_policy(TrainConfig(model=str(folder), device="cpu", backend="torch", **flags))


def with_copy(policy: Policy) -> Policy:
    """The policy with a model of its own."""
    model = copy.deepcopy(policy.model)
    head = policy.head._replace(weight=model.get_output_embeddings().weight)
    return dataclasses.replace(policy, model=model, head=head)


def own_logits(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """The model's own logits (N, V) before each token, from one forward for each completion."""
    found = []
    for i, completion in zip(rollout.prompt_index, rollout.completions(), strict=True):
        prompt = rollout.prompts[i]
        logits = model(input_ids=torch.cat((prompt, completion))[None]).logits[0]
        found.append(logits[len(prompt) - 1 : -1])
    return torch.cat(found)


def own_logps(model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """The model's own log-probs (N,), over the rollout's support where it has one."""
    logits = own_logits(model, rollout) / temperature
    if rollout.support is not None:
        kept = torch.zeros_like(logits, dtype=torch.bool)
        kept[rows_of_entries(rollout.support.cu, len(rollout.support.ids)), rollout.support.ids] = (
            True
        )
        logits = logits.masked_fill(~whole_where_nothing(kept), -torch.inf)
    return logits.log_softmax(-1).gather(-1, rollout.token_ids[:, None])[:, 0]


def read_metrics(folder: Path) -> list[dict]:
    """What a run has logged, a dict for each step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def command(*arguments: object) -> tuple[list[str], dict[str, str]]:
    """A command line of the training script, and its environment."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return [sys.executable, str(SCRIPT), *map(str, arguments)], environment


@pytest.fixture(scope="session")
def script() -> ModuleType:
    """The training script, imported."""
    spec = importlib.util.spec_from_file_location("grpo_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    """As in the script: models as small as these only wait for more."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig(device="cpu", backend="torch", num_prompts=3, num_generations=4)


@pytest.fixture
def policy(config: TrainConfig) -> Policy:
    """An untrained policy, whose completions differ in length."""
    torch.manual_seed(0)
    return load_policy(config)


@pytest.fixture
def sampler(policy: Policy) -> ModelSampler:
    return ModelSampler(policy)


@pytest.fixture
def rollout(policy: Policy, sampler: ModelSampler) -> Rollout:
    """Twelve completions with advantages, of prompts that need padding."""
    torch.manual_seed(1)
    prompts = encode(policy, ["1+2=", "34+56=", "7+10="])
    rollout = sampler.sample(prompts, 4, Sampling(8, 1.3))
    return dataclasses.replace(rollout, advantages=torch.randn(12))


@pytest.fixture
def task():
    return arithmetic_task(seed=0, eval_size=20)


@pytest.fixture
def lengths() -> Task:
    """A task with rewards that differ within groups, and that draw random numbers."""

    def length(completions: list[str]) -> list[float]:
        return [len(text) + random.random() for text in completions]

    return dataclasses.replace(arithmetic_task(0, 8), rewards=(Reward("length", length),))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 model with a byte tokenizer and no chat template, saved in a folder."""
    folder = tmp_path_factory.mktemp("tiny-qwen2")
    vocab = {"<pad>": 0, "<|endoftext|>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    # Qwen's own folders come with sampling defaults that the loop must not inherit.
    model.generation_config.update(repetition_penalty=1.5, top_k=3, do_sample=True)
    model.save_pretrained(folder)
    return folder
