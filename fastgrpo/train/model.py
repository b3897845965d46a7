"""The policy: a causal language model, its tokenizer, and its head as the fused loss takes it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import fastgrpo
from fastgrpo import ModelHead

from .completions import Rollout, left_padded


@dataclass(frozen=True)
class Policy:
    """A model that samples and learns."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: ModelHead

    @property
    def end_ids(self) -> list[int]:
        """Return every token id that ends a text; demonstrations end with the first."""
        return end_ids(self.model.generation_config, self.tokenizer)

    def completion_hidden(self, rollout: Rollout) -> Tensor:
        """Return hidden states (N, H); the state in row n predicts token n of the completions.

        This is the only place where positions are shifted.
        """
        completion_ids = pad_sequence(rollout.completions(), batch_first=True)
        prompt_ids, prompt_mask = left_padded(rollout.prompts)
        input_ids = torch.cat((prompt_ids[rollout.prompt_index], completion_ids), dim=1)
        mask = torch.cat((prompt_mask[rollout.prompt_index], rollout.completion_mask), dim=1)
        hidden = self.model.base_model(
            input_ids=input_ids,
            attention_mask=None if mask.all() else mask.long(),
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, prompt_ids.shape[1] - 1 : -1][rollout.completion_mask]

    @torch.no_grad()
    def logps(
        self, rollout: Rollout, micro_batch_size: int, temperature: float, backend: str
    ) -> Tensor:
        """Return the log-probs (N,) fp32 of the sampled tokens, without gradient."""
        logps = torch.zeros(rollout.token_ids.shape, device=rollout.token_ids.device)
        for chosen in rollout.micro_batches(micro_batch_size):
            batch = rollout[chosen]
            out = fastgrpo.linear_logps(
                self.completion_hidden(batch),
                self.head.weight,
                batch.token_ids,
                temperature=temperature,
                backend=backend,
                **self.head.options(),
            )
            logps[rollout.tokens_of(chosen)] = out.logps
        return logps

    def frozen_copy(self) -> Policy:
        """Return a copy that no longer learns: the reference model."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        return Policy(model, self.tokenizer, fastgrpo.head_of(model))


def end_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ends that tokenizer and generation config name, the tokenizer's own first."""
    named = generation.eos_token_id
    several = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *several) if i is not None))
