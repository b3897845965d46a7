"""Arithmetic in words, made here, for a small instruct model that half knows it."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from .chat import chat_prompt
from .rewards import Accuracy, Reward, one_by_one
from .stated_number import calculated_number
from .tasks import Example, Task


def sums_task(tokenizer: PreTrainedTokenizerBase, seed: int, eval_size: int) -> Task:
    """Return "What is a + b?", a and b from 1 to 20; held-out questions are not trained on.

    Nor is ``b + a`` where ``a + b`` is held out: both are, or neither.
    """
    numbers = range(1, 21)
    twins = [
        [(f"{x} + {y}", a + b) for x, y in dict.fromkeys([(a, b), (b, a)])]
        for a in numbers
        for b in range(1, a + 1)
    ]
    return _task("sums", tokenizer, twins, seed, eval_size)


def differences_task(tokenizer: PreTrainedTokenizerBase, seed: int, eval_size: int) -> Task:
    """Return "What is a - b?", b below a, a up to 30; held-out questions are not trained on."""
    questions = [[(f"{a} - {b}", a - b)] for a in range(2, 31) for b in range(1, a)]
    return _task("differences", tokenizer, questions, seed, eval_size)


def states_the_answer(completion: str, answer: str) -> float:
    """Return 1.0 if the completion is the answer, or a calculation with that result, else 0."""
    return float(calculated_number(completion) == int(answer))


def _task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    twins: list[list[tuple[str, int]]],
    seed: int,
    eval_size: int,
) -> Task:
    """Return questions with their answers as a task; those that are twins are not parted."""
    count = sum(map(len, twins))
    if eval_size >= count:
        raise ValueError(f"eval_size: expected below {count}, got {eval_size}")
    random.Random(seed).shuffle(twins)
    # One without a twin comes last. It fills the place that two together would overflow.
    twins.append(twins.pop(max(i for i, alike in enumerate(twins) if len(alike) == 1)))
    train: list[Example] = []
    held_out: list[Example] = []
    for alike in twins:
        part = held_out if len(held_out) + len(alike) <= eval_size else train
        for question, answer in alike:
            chat = {"role": "user", "content": f"What is {question}? Answer with a number only."}
            prompt = chat_prompt(tokenizer, [chat])
            part.append(Example(prompt, str(answer), messages=(chat,)))
    correct = one_by_one(states_the_answer)
    return Task(name, train, held_out, (Reward("correct", correct),), Accuracy(correct))
