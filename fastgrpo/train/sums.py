"""Arithmetic in words, made here, for a small instruct model that half knows it."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from .chat import chat_prompt
from .rewards import Accuracy, Reward, one_by_one
from .stated_number import calculated_number
from .tasks import Example, Task


def sums_task(tokenizer: PreTrainedTokenizerBase, seed: int, eval_size: int) -> Task:
    """Return "What is a + b?", a and b from 1 to 20; held-out questions are not trained on."""
    numbers = range(1, 21)
    questions = [(f"{a} + {b}", a + b) for a in numbers for b in numbers]
    return _task(tokenizer, questions, seed, eval_size)


def differences_task(tokenizer: PreTrainedTokenizerBase, seed: int, eval_size: int) -> Task:
    """Return "What is a - b?", b below a, a up to 30; held-out questions are not trained on."""
    questions = [(f"{a} - {b}", a - b) for a in range(2, 31) for b in range(1, a)]
    return _task(tokenizer, questions, seed, eval_size)


def states_the_answer(completion: str, answer: str) -> float:
    """Return 1.0 if the completion is the answer, or a calculation with that result, else 0."""
    return float(calculated_number(completion) == int(answer))


def _task(
    tokenizer: PreTrainedTokenizerBase, questions: list[tuple[str, int]], seed: int, eval_size: int
) -> Task:
    if eval_size >= len(questions):
        raise ValueError(f"eval_size: expected below {len(questions)}, got {eval_size}")
    examples = []
    for question, answer in questions:
        chat = {"role": "user", "content": f"What is {question}? Answer with a number only."}
        examples.append(Example(chat_prompt(tokenizer, [chat]), str(answer), messages=(chat,)))
    random.Random(seed).shuffle(examples)
    correct = one_by_one(states_the_answer)
    return Task(
        train=examples[eval_size:],
        held_out=examples[:eval_size],
        rewards=(Reward("correct", correct),),
        accuracy=Accuracy(correct),
    )
