"""What both sides of `benchmarks.train_step` get: tokens, rewards, ends and a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from fastgrpo.train.arithmetic import character_tokenizer

# SmolLM2-135M's.
SHAPE = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    tie_word_embeddings=True,
)
TINY_SHAPE = SHAPE | dict(vocab_size=300, hidden_size=72, intermediate_size=96, num_hidden_layers=2)


Commands = Iterator[dict[str, Any]]  # {"what": ..., "alive": ...}
Answer = Callable[[dict[str, float]], None]


def times(sampling: float, step: float) -> dict[str, float]:
    """Return a step's times, in seconds: what is not sampling is the update."""
    return {"sampling": sampling, "update": step - sampling, "step": step}


class Case(NamedTuple):
    """Groups of completions of given lengths."""

    prompts: tuple[int, ...]  # tokens of each
    lengths: tuple[int, ...]  # tokens of each completion, one group after the other
    vocab: int
    ends: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        return len(self.lengths) // len(self.prompts)

    def draw(self, lengths: Sequence[int], seed: int) -> list[list[int]]:
        """Return random tokens, none of which ends a text."""
        rng = random.Random(seed)
        allowed = [i for i in range(self.vocab) if i not in self.ends]
        return [[rng.choice(allowed) for _ in range(n)] for n in lengths]

    def prompt_ids(self) -> list[list[int]]:
        return self.draw(self.prompts, seed=1)

    def completion_ids(self) -> list[list[int]]:
        """Return the committed completions; each stops with an end token."""
        drawn = self.draw(self.lengths, seed=2)
        return [ids[:-1] + [self.ends[0]] for ids in drawn]

    def rewards(self, alive: str) -> list[float]:
        """Return rewards that differ within every group ("all"), or every other one ("half")."""
        groups = range(len(self.prompts))
        moving = [alive == "all" or group % 2 == 0 for group in groups]
        return [float(moving[g] and i % 3 == 0) for g in groups for i in range(self.group)]


# One in eight is cut at 128 tokens; the others have 39 on average, so that all have 50.
LENGTHS = (
    128, 22, 31, 58, 44, 19, 47, 53,
    33, 128, 61, 27, 40, 36, 52, 24,
    46, 29, 55, 128, 18, 41, 38, 48,
    35, 57, 26, 43, 128, 30, 50, 32,
)  # fmt: skip
FULL = Case(prompts=(138, 151, 146, 165), lengths=LENGTHS, vocab=SHAPE["vocab_size"])
TINY = Case(prompts=(5, 9), lengths=(8, 3, 1, 4, 2, 5), vocab=TINY_SHAPE["vocab_size"])


class ForcedEnds(LogitsProcessor):
    """A completion ends at its committed length and not before."""

    def __init__(self, lengths: Sequence[int], ends: Sequence[int], width: int) -> None:
        self.lengths, self.ends, self.width = torch.tensor(lengths), list(ends), width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As of transformers: row i is completion i."""
        return self.forced(input_ids, scores, torch.arange(len(scores)))

    def forced(self, input_ids: Tensor, scores: Tensor, samples: Tensor) -> Tensor:
        last = self.lengths[samples.cpu()] == input_ids.shape[1] + 1 - self.width
        scores = scores.clone()
        scores[:, self.ends] = -torch.inf
        scores[last.to(scores.device)] = -torch.inf
        scores[last.to(scores.device), self.ends[0]] = 0.0
        return scores


class ForcedEndsOfSamples(ForcedEnds):
    """The same, told which completions the rows are: finished ones leave the batch."""

    def __call__(self, input_ids: Tensor, scores: Tensor, samples: Tensor) -> Tensor:
        return self.forced(input_ids, scores, samples)


def random_model(folder: Path, shape: dict[str, Any]) -> None:
    """Save a model with random weights, and a tokenizer whose tokens are its first ones."""
    tokenizer = character_tokenizer()
    special = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, **special, bos_token_id=None))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
