"""Tasks: prompts, their answers, and the reward of a completion."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


class TemplatedPrompt(str):
    """A prompt that a chat template wrote, with its special tokens: none are added to it."""


@dataclass(frozen=True)
class Example:
    """A prompt and its answer.

    The tokenizer adds its special tokens, such as a BOS, to a prompt that is not a TemplatedPrompt.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Training and held-out examples, with the functions that judge their completions.

    ``reward`` may raise, or return None or NaN, for a completion that it cannot score. Accuracy
    counts ``is_correct``. ``demonstrations`` are worked examples for a supervised warm-up; if there
    are none, there is no warm-up.
    """

    train: list[Example]
    held_out: list[Example]
    reward: Callable[[str, str], float | None]  # (completion, answer) -> reward
    is_correct: Callable[[str, str], bool]  # (completion, answer) -> counts as solved
    demonstrations: list[Example]


def batches(examples: list[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches forever. Every example comes once per pass, in a new order each pass."""
    if not examples:
        raise ValueError("examples: expected at least one to train on, got none")
    rng, queue = random.Random(seed), []
    while True:
        while len(queue) < size:
            queue += rng.sample(examples, len(examples))
        yield queue[:size]
        queue = queue[size:]


def score(
    reward: Callable[[str, str], float | None], completions: list[str], answers: list[str]
) -> Tensor:
    """Return one fp32 reward per completion; NaN marks one that could not be scored."""
    return torch.tensor(
        [_score_one(reward, *pair) for pair in zip(completions, answers, strict=True)]
    )


def _score_one(reward: Callable[[str, str], float | None], completion: str, answer: str) -> float:
    try:
        value = reward(completion, answer)
        return float("nan") if value is None or abs(value) == float("inf") else float(value)
    except Exception as error:  # the user's code: one bad completion must not end a long run
        kind = type(error).__name__
        warnings.warn(f"the reward raised {kind}: the completion is unscorable", stacklevel=3)
        return float("nan")
