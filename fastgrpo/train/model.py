"""The policy: a causal language model, its tokenizer, and its head as the fused loss takes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import fastgrpo
from fastgrpo import ModelHead

from .completions import Rollout
from .layouts import PADDED, Layout
from .microbatches import micro_batches

Result = TypeVar("Result")


@dataclass(frozen=True)
class Policy:
    """A model that samples and learns."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: ModelHead
    layout: Layout = PADDED
    generation: GenerationConfig | None = None
    """What the model came with, for its checkpoints: `model` has the token ids alone."""

    @property
    def end_ids(self) -> list[int]:
        """Return every token id that ends a text; demonstrations end with the first."""
        return end_ids(self.model.generation_config, self.tokenizer)

    @property
    def mesh(self) -> DeviceMesh | None:
        """The processes among which the weights are parted; None: each has all of them."""
        return None

    def completion_hidden(self, rollout: Rollout) -> Tensor:
        """Return hidden states (N, H); the state in row n predicts token n of the completions."""
        return self.layout.hidden(self.model, rollout)

    def apply(
        self, function: Callable[..., Result], rollout: Rollout, *arguments: Any, **options: Any
    ) -> Result:
        """Return ``function(hidden, weight, *arguments, **options)`` of a rollout's states.

        It is `grpo_loss` or `linear_logps`; what else the head has is added to the options.
        """
        hidden = self.completion_hidden(rollout)
        return function(hidden, self.head.weight, *arguments, **options, **self.head.options())

    def in_step(self, micro_batches: list[Tensor]) -> list[Tensor]:
        """Return what an update forwards, so that no process waits for another's passes."""
        return micro_batches

    def gathered(self) -> AbstractContextManager[None]:
        """Return a context in which the model has all its weights, without gradients.

        All processes enter it. None in it may change the weights.
        """
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """Return what is saved of the model, by the names of its state_dict; in `gathered`."""
        return self.model.state_dict()

    @torch.no_grad()
    def logps(self, rollout: Rollout, max_tokens: int, temperature: float, backend: str) -> Tensor:
        """Return the log-probs (N,) fp32 of the sampled tokens, without gradient.

        They are those over the rollout's support, where it has one. At most `max_tokens` are
        forwarded at a time.
        """
        logps = torch.zeros(rollout.token_ids.shape, device=rollout.token_ids.device)
        everything = torch.arange(len(rollout), device=logps.device)
        with self.gathered():
            for chosen in micro_batches(rollout, everything, max_tokens, self.layout):
                batch = rollout[chosen]
                out = self.apply(
                    fastgrpo.linear_logps,
                    batch,
                    batch.token_ids,
                    temperature=temperature,
                    support=batch.support,
                    backend=backend,
                )
                logps[rollout.tokens_of(chosen)] = out.logps
        return logps


def end_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ends that tokenizer and generation config name, the tokenizer's own first."""
    named = generation.eos_token_id
    several = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *several) if i is not None))
