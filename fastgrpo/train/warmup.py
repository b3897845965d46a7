"""The supervised start: imitate demonstrations, so that some samples are right."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch

import fastgrpo

from .config import TrainConfig
from .model import Policy
from .optimizer import MasterAdamW
from .rollout import demonstrate
from .tasks import Shuffled, Task

BATCH_SIZE, LEARNING_RATE, MAX_GRAD_NORM = 64, 3e-3, 1.0


def warm_up(policy: Policy, task: Task, steps: Iterable[int], config: TrainConfig) -> None:
    """Take one supervised optimizer step for each of ``steps``.

    The loss is cross-entropy: REINFORCE with advantage 1 on a given text.
    """
    optimizer = MasterAdamW(policy.model.parameters(), LEARNING_RATE, config.warmup_steps)
    demonstrations = Shuffled(task.demonstrations, config.seed)
    for _ in steps:
        examples = list(islice(demonstrations, BATCH_SIZE))
        batch = demonstrate(policy, [e.prompt for e in examples], [e.answer for e in examples])
        out = policy.apply(
            fastgrpo.grpo_loss,
            batch,
            batch.token_ids,
            None,
            torch.ones(len(batch), device=batch.token_ids.device),
            cu_seqlens=batch.cu_seqlens,
            config="reinforce",
            backend=config.backend,
        )
        optimizer.backward(out.loss)
        optimizer.step(out.loss.item(), MAX_GRAD_NORM)
