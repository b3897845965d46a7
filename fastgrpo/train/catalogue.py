"""The tasks by name, with the rewards that flags put in place of their own."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedTokenizerBase

from . import ranks
from .arithmetic import arithmetic_task
from .config import TrainConfig
from .gsm8k import gsm8k_task
from .own_data import own_task
from .reward_process import in_own_process
from .rewards import Accuracy, load_rewards
from .scoring import check_rewards, longest
from .sums import differences_task, sums_task
from .tasks import Task


def load_task(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, own: Task | None = None
) -> Task:
    """Return the task that ``config`` names, or ``own``, with the rewards of the flags.

    ValueError for data or rewards that do not fit, and for an accuracy by none of the rewards.
    """
    task = own or _named(config, tokenizer)
    if config.reward:
        given = load_rewards(config.reward, config.reward_weight or None)
        if config.reward_timeout:
            given = tuple(in_own_process(reward, config.reward_timeout) for reward in given)
            ranks.allow(longest(len(given), config.reward_timeout))
        task = dataclasses.replace(task, rewards=given)
    if config.accuracy:
        name, threshold = config.accuracy_threshold()
        known = {reward.name: reward.function for reward in task.rewards}
        if name not in known:
            raise ValueError(f"accuracy: expected one of the rewards {[*known]}, got {name!r}")
        task = dataclasses.replace(task, accuracy=Accuracy(known[name], threshold))
    check_rewards(task)
    return task


def _named(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    files = (config.data, config.eval_data, config.eval_size)
    if config.task == "arithmetic":
        return arithmetic_task(config.seed, config.eval_size)
    if config.task in ("sums", "differences"):
        made = sums_task if config.task == "sums" else differences_task
        return made(tokenizer, config.seed, config.eval_size)
    if config.task == "gsm8k":
        return gsm8k_task(tokenizer, *files)
    return own_task(tokenizer, *files)
