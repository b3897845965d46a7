"""A smaller budget of tokens when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from tqdm import tqdm

from .config import TrainConfig

Result = TypeVar("Result")


def fitting(
    config: TrainConfig, attempt: Callable[[int], Result], undo: Callable[[], None] = lambda: None
) -> Result:
    """Return ``attempt(max_tokens)``, with half of the tokens as often as memory runs out.

    ``config.max_tokens_per_microbatch`` is halved for the rest of the run, which changes no result
    but for rounding. ``undo`` takes back what an attempt has begun. torch.OutOfMemoryError is
    raised where one token is too much, and with ``config.fsdp``, as no process can begin again
    while the others are in the middle of the pass.
    """
    while True:
        try:
            return attempt(config.max_tokens_per_microbatch)
        except torch.OutOfMemoryError:
            if config.max_tokens_per_microbatch == 1 or config.fsdp:
                raise
        # Behind the except clause, where the error no longer holds the attempt's tensors.
        undo()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        config.max_tokens_per_microbatch //= 2
        tqdm.write(
            "memory ran out: --max-tokens-per-microbatch is "
            f"{config.max_tokens_per_microbatch} from here on"
        )
