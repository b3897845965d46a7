"""A task of your own: prompts, a reward, what counts as right. A tiny model learns it by trying.

  python examples/custom_task.py    # half a minute on one CPU core

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


def exact(completions: list[str], answer: list[str], **columns: list) -> list[float]:
    """Return 1 for each completion that is the answer and nothing else."""
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def largest_digit(held_out: int) -> Task:
    """Return numbers of three digits, whose largest digit is wanted."""
    examples = [Example(f"{number}=", max(str(number))) for number in range(100, 1000)]
    random.Random(0).shuffle(examples)
    rewards = (Reward("exact", exact),)
    return Task("largest-digit", examples[held_out:], examples[:held_out], rewards, Accuracy(exact))


if __name__ == "__main__":
    config = TrainConfig(
        warmup_steps=0, beta=0.0, max_completion_length=2, max_steps=100, learning_rate=5e-4
    )
    sys.exit(main(config, largest_digit(held_out=100)))
