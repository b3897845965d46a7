"""A task of your own: prompts, a reward, and what counts as right. A tiny model begins to copy.

  python examples/custom_task.py

With a pretrained model nothing needs to be written but the reward, and a file of prompts:
python examples/grpo_train.py --task jsonl --data FILE.jsonl --reward FILE.py:function --model NAME
"""

from __future__ import annotations

import random
import sys

from grpo_train import main

from fastgrpo.train.config import TrainConfig
from fastgrpo.train.rewards import Accuracy, Reward
from fastgrpo.train.tasks import Example, Task


def alike(completions: list[str], answer: list[str], **columns: list) -> list[float]:
    """Return the share of digits that are right: a first step in the right direction counts."""
    return [
        sum(a == b for a, b in zip(text, wanted, strict=False)) / max(len(text), len(wanted))
        for text, wanted in zip(completions, answer, strict=True)
    ]


def copying(held_out: int) -> Task:
    """Return numbers of two digits, to be written once more."""
    examples = [Example(f"{number}=", str(number)) for number in range(10, 100)]
    random.Random(0).shuffle(examples)
    rewards = (Reward("alike", alike),)
    return Task(examples[held_out:], examples[:held_out], rewards, Accuracy(alike, threshold=1.0))


if __name__ == "__main__":
    config = TrainConfig(warmup_steps=0, beta=0.0, max_steps=150, learning_rate=1e-3, eval_every=25)
    sys.exit(main(config, copying(held_out=20)))
