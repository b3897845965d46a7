"""The policy: a causal language model, its tokenizer, and its head as the fused loss takes it."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import fastgrpo
from fastgrpo import ModelHead

from .arithmetic import character_tokenizer, tiny_model
from .completions import Rollout, left_padded
from .config import TrainConfig


@dataclass(frozen=True)
class Policy:
    """A model that samples and learns."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: ModelHead

    @property
    def end_ids(self) -> list[int]:
        """Return every token id that ends a text; demonstrations end with the first."""
        return _end_ids(self.model.generation_config, self.tokenizer)

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


def load_policy(config: TrainConfig) -> Policy:
    """Load the model and tokenizer that ``config`` names, or make tiny ones; check the head."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": torch.bfloat16 if device.startswith("cuda") else torch.float32}.get(
        config.dtype
    )
    dtype = dtype or getattr(torch, config.dtype)
    if config.model is None:
        tokenizer = character_tokenizer()
        model = tiny_model(tokenizer).to(dtype)
    else:
        tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype)
    # Only the token ids are kept: a repetition penalty or top-k that came with the model would make
    # the sampler's distribution differ from the one that the loss assumes.
    loaded = model.generation_config
    ends = _end_ids(loaded, tokenizer)
    if not ends:
        raise ValueError(
            f"model: expected an end-of-sequence token, of the tokenizer or the generation config, "
            f"got none in {config.model}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    _check_ids(model, tokenizer, ends)
    model.generation_config = GenerationConfig(
        eos_token_id=ends,
        bos_token_id=loaded.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Dropout stays off while learning, so that the ratio to the sampler starts at 1.
    model = model.to(device).eval()
    if config.gradient_checkpointing:
        _recompute_activations(model)
    return Policy(model, tokenizer, fastgrpo.head_of(model))


def _end_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ends that tokenizer and generation config name, the tokenizer's own first."""
    named = generation.eos_token_id
    several = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *several) if i is not None))


def _check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
    """Raise unless the model has a row for every token that is put beside a text."""
    rows = model.get_input_embeddings().num_embeddings
    written = tokenizer("")["input_ids"]  # what the tokenizer adds to every prompt
    for role, ids in (("pad", [tokenizer.pad_token_id]), ("end", ends), ("special", written)):
        if beyond := [i for i in ids if i >= rows]:
            raise ValueError(
                f"model: expected the {role} token of its tokenizer below {rows}, the rows of its "
                f"embedding, got {tokenizer.convert_ids_to_tokens(beyond)} with ids {beyond}; "
                f"resize the embedding, or choose a token that it has"
            )


def _recompute_activations(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on. Layers heed it in training mode only, so they lose dropout.

    Everything else stays in evaluation mode. ``model.config`` keeps its values: they are saved.
    """
    model.gradient_checkpointing_enable()
    for module in model.modules():
        module.training = module is not model and getattr(module, "gradient_checkpointing", False)
        if module.training:
            _silence(module)
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config = copy.copy(module.config)
                _silence(module.config)


def _silence(owner: nn.Module | PreTrainedConfig) -> None:
    """Set the rates of what is random in training to 0: dropout, dropped layers, jitter."""
    for name, value in list(vars(owner).items()):
        if re.search("drop|jitter", name) and type(value) in (int, float):
            setattr(owner, name, 0.0)
