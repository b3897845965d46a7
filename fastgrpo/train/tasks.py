"""Tasks: prompts, what rewards know about them, and the rewards."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .rewards import Accuracy, Reward


class TemplatedPrompt(str):
    """A prompt that a chat template wrote, with its special tokens: none are added to it."""


@dataclass(frozen=True)
class Example:
    """A prompt, and what its rewards know beside it.

    The tokenizer adds its special tokens, such as a BOS, to a prompt that is not a TemplatedPrompt.
    Rewards get ``answer``, unless it is None, and every one of ``columns`` under its name. If
    ``messages`` made the prompt, they get those and the completion as a message too, as in TRL.
    """

    prompt: str
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class Task:
    """Training and held-out examples, with the functions that judge their completions.

    Run folders are named after ``name``. A completion's reward is the weighted sum of ``rewards``.
    ``accuracy`` says which held-out completions count as right; None: nothing does, and the reward
    alone is reported. ``demonstrations`` are worked examples for a supervised warm-up; if there are
    none, there is no warm-up.
    """

    name: str
    train: list[Example]
    held_out: list[Example]
    rewards: tuple[Reward, ...]
    accuracy: Accuracy | None = None
    demonstrations: list[Example] = field(default_factory=list)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the name and of all prompts and answers, to tell tasks apart."""
        examples = [[(e.prompt, e.answer) for e in part] for part in (self.train, self.held_out)]
        return hashlib.sha256(json.dumps([self.name, examples]).encode()).hexdigest()

    @cached_property
    def columns(self) -> frozenset[str]:
        """The names under which rewards are given what at least one of the examples knows."""
        examples = self.train + self.held_out
        known = {"answer"} if any(e.answer is not None for e in examples) else set()
        return frozenset(known).union(*(e.columns for e in examples))


class Shuffled(Iterator[Example]):
    """Examples forever. Every one comes once per pass, in a new order each pass."""

    def __init__(self, examples: list[Example], seed: int) -> None:
        if not examples:
            raise ValueError("examples: expected at least one to train on, got none")
        self.drawn = 0
        self._passes = self._orders(examples, random.Random(seed))

    def __next__(self) -> Example:
        self.drawn += 1
        return next(self._passes)

    def state_dict(self) -> dict[str, int]:
        """Return how many have been drawn."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Draw as many as `state_dict` says."""
        while self.drawn < state["drawn"]:
            next(self)

    @staticmethod
    def _orders(examples: list[Example], rng: random.Random) -> Iterator[Example]:
        while True:
            yield from rng.sample(examples, len(examples))
