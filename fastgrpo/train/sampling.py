"""How completions are drawn: the settings, the random numbers, and tokens from scores."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastgrpo import checks

from .flags import Flags


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    ``seed`` is any non-negative integers, such as the run's and the step's: they and the tokens of
    a prompt determine its completions, whatever stands beside it in the batch. Equal prompts get
    different ones; ``before`` are those of other processes that count as earlier. ``processors``
    come before the temperature. One that has a third argument ``samples`` gets the numbers (rows,)
    int64 of the completions that its rows belong to. Behind the temperature come top-k, top-p and
    min-p, in the order of transformers' ``generate``.
    """

    max_length: int
    temperature: float = 1.0  # 0 decodes greedily
    top_k: int = 0  # the likeliest tokens that are kept; 0: all
    top_p: float = 1.0  # the likeliest tokens are kept until their mass is this
    min_p: float = 0.0  # kept is what has this times the largest probability
    seed: tuple[int, ...] = (0,)
    before: tuple[Tensor, ...] = ()
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)

    @classmethod
    def of(cls, config: Flags, seed: tuple[int, ...], before: tuple[Tensor, ...]) -> Sampling:
        """Return how a run with these settings samples."""
        length, filters = config.max_completion_length, (config.top_k, config.top_p, config.min_p)
        return cls(length, config.temperature, *filters, seed, before)

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length: expected at least 1, got {self.max_length}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")
        check_filters(self.top_k, self.top_p, self.min_p)
        if self.filters and not self.temperature:
            raise ValueError("temperature: expected above 0 with top_k, top_p or min_p, got 0")

    @property
    def filters(self) -> bool:
        """Whether a part of the vocabulary may be left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def all_processors(self) -> LogitsProcessorList:
        """Return what turns logits into those of the distribution that is sampled from."""
        processors = [*self.processors]
        if self.temperature not in (0.0, 1.0):
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(float(self.top_p)))
        if self.min_p:
            processors.append(MinPLogitsWarper(float(self.min_p)))
        return LogitsProcessorList(processors)


def check_filters(top_k: int, top_p: float, min_p: float) -> None:
    """Raise ValueError unless these are what ``Sampling`` takes."""
    if type(top_k) is not int or top_k < 0:
        raise ValueError(f"top_k: expected an int >= 0, got {top_k!r}")
    checks.share("top_p", top_p)
    checks.finite("min_p", min_p, 0.0, 1.0)


def choose(scores: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return tokens (S,) int64 and their log-probs (S,) fp32.

    Args:
        scores: (S, V) fp32, processed logits.
        uniforms: (S,) fp64 in [0, 1), inserted into the inverse of the cumulative distribution;
            None: the likeliest token.
    """
    logps = scores.log_softmax(dim=-1)
    if uniforms is None:
        tokens = scores.argmax(dim=-1)
    else:
        below = logps.exp().cumsum(dim=-1, dtype=torch.float64)
        wanted = (uniforms * below[:, -1])[:, None]
        tokens = torch.searchsorted(below, wanted, right=True)[:, 0].clamp(max=scores.shape[1] - 1)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


def uniforms_of(prompts: Sequence[Tensor], num_generations: int, sampling: Sampling) -> Tensor:
    """Return the uniform numbers of each completion's tokens, (S, max_length) fp64 on the CPU.

    Every completion has a generator of its own. Its seed is made of ``sampling.seed``, the tokens
    of the prompt, how many equal prompts come before it, and its number in the group.
    """
    seen, rows = Counter(map(_digest, sampling.before)), []
    for prompt in prompts:
        tokens = _digest(prompt)
        entropy = [*sampling.seed, seen[tokens], *np.frombuffer(tokens, dtype="<u4")]
        for generation in range(num_generations):
            generator = np.random.default_rng([generation, *entropy])
            rows.append(generator.random(sampling.max_length))
        seen[tokens] += 1
    return torch.from_numpy(np.stack(rows))


def _digest(prompt: Tensor) -> bytes:
    return hashlib.sha256(np.asarray(prompt.cpu(), dtype="<i8").tobytes()).digest()
