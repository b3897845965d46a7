"""The tasks by name, with the rewards that flags put in place of their own."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedTokenizerBase

from .arithmetic import arithmetic_task
from .config import TrainConfig
from .gsm8k import gsm8k_task
from .own_data import own_task
from .rewards import Accuracy, load_rewards
from .scoring import check_rewards
from .sums import differences_task, sums_task
from .tasks import Task


def load_task(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Return the task that ``config`` names; ValueError for data or rewards that do not fit."""
    files = (config.data, config.eval_data, config.eval_size)
    if config.task == "arithmetic":
        task = arithmetic_task(config.seed, config.eval_size)
    elif config.task in ("sums", "differences"):
        made = sums_task if config.task == "sums" else differences_task
        task = made(tokenizer, config.seed, config.eval_size)
    elif config.task == "gsm8k":
        task = gsm8k_task(tokenizer, *files)
    else:
        task = own_task(tokenizer, *files)
    if config.reward:
        own = load_rewards(config.reward, config.reward_weight or None)
        task = dataclasses.replace(task, rewards=own)
    if config.accuracy:
        name, threshold = config.accuracy_threshold()
        known = {reward.name: reward.function for reward in task.rewards}
        task = dataclasses.replace(task, accuracy=Accuracy(known[name], threshold))
    check_rewards(task)
    return task
