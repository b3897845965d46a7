"""The policy: a causal language model, its tokenizer, and its head as the fused loss takes it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import fastgrpo

from .arithmetic import character_tokenizer, tiny_model
from .completions import Rollout
from .config import TrainConfig

# Fields of model configs that scale the logits: 1 multiplies, -1 divides. logits_scaling divides in
# every family except hyperclovax.
SCALE_FIELDS = {
    "logit_scale": 1,
    "logits_scaling": -1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
    "logits_mup_width_multiplier": -1,
}
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """The last layer: z = softcap(logit_scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    def options(self) -> dict:
        """Return the keyword arguments of fastgrpo's functions that describe the head."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


@dataclass(frozen=True)
class Policy:
    """A model that samples and learns."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: Head

    def completion_hidden(self, rollout: Rollout) -> Tensor:
        """Return hidden states (B, T, H); the state at t predicts completion token t.

        This is the only place where positions are shifted.
        """
        input_ids = torch.cat((rollout.prompt_ids, rollout.completion_ids), dim=1)
        mask = torch.cat((rollout.prompt_mask, rollout.completion_mask), dim=1)
        hidden = self.model.base_model(
            input_ids=input_ids,
            attention_mask=None if mask.all() else mask.long(),
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, rollout.prompt_ids.shape[1] - 1 : -1]

    @torch.no_grad()
    def logps(
        self, rollout: Rollout, micro_batch_size: int, temperature: float, backend: str
    ) -> Tensor:
        """Return log-probs (B, T) fp32 of the sampled tokens, without gradient; 0 where masked."""
        logps = torch.zeros(rollout.completion_ids.shape, device=rollout.completion_ids.device)
        for rows in rollout.micro_batches(micro_batch_size):
            batch = rollout[rows]
            token_ids = batch.completion_ids.masked_fill(~batch.completion_mask, -100)
            out = fastgrpo.linear_logps(
                self.completion_hidden(batch),
                self.head.weight,
                token_ids,
                temperature=temperature,
                backend=backend,
                **self.head.options(),
            )
            logps[rows, : token_ids.shape[1]] = out.logps
        return logps

    def frozen_copy(self) -> Policy:
        """Return a copy that no longer learns: the reference model."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        return Policy(model, self.tokenizer, describe_head(model))


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
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Only the token ids are kept: a repetition penalty or top-k that came with the model would make
    # the sampler's distribution differ from the one that the loss assumes.
    loaded = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id if loaded.eos_token_id is None else loaded.eos_token_id,
        bos_token_id=loaded.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Dropout stays off while learning, so that the ratio to the sampler starts at 1. Only gradient
    # checkpointing needs training mode.
    model = model.to(device).eval()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    policy = Policy(model, tokenizer, describe_head(model))
    check_head(policy, config.backend)
    return policy


def describe_head(model: PreTrainedModel) -> Head:
    """Return the model's head, with the scale and softcap from the model's config."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    scale, softcap = 1.0, None
    for name, power in SCALE_FIELDS.items():
        value = getattr(config, name, None)
        if isinstance(value, (int, float)):
            multiplies = power == 1 or (
                name == "logits_scaling" and "hyperclovax" in config.model_type
            )
            scale *= value if multiplies else 1 / value
    for name in SOFTCAP_FIELDS:
        softcap = getattr(config, name, None) or softcap
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


@torch.no_grad()
def check_head(policy: Policy, backend: str) -> None:
    """Raise ValueError if the fused head and the model's own forward disagree on random tokens.

    Some models transform the logits in ways that the config fields above do not describe. Training
    would then use other log-probs than the sampler, and fail silently.
    """
    vocab_size, device = policy.head.weight.shape[0], policy.head.weight.device
    ids = torch.randint(vocab_size, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    rollout = Rollout(ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:])
    ours = policy.logps(rollout, 2, temperature=1.0, backend=backend)
    theirs = policy.model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    error = (ours - theirs.gather(-1, ids[:, 1:, None])[..., 0]).abs().max().item()
    # A 16-bit model rounds its own logits, by up to 0.06 each at |z| = 30.
    tolerance = 1e-3 if policy.head.weight.dtype == torch.float32 else 0.25
    if not error <= tolerance:
        head = policy.head
        raise ValueError(
            f"model: expected the hidden states and head of {type(policy.model).__name__} to give "
            f"log-probs within {tolerance} nats of its own forward, got {error:.2g} "
            f"with logit_scale={head.logit_scale}, softcap={head.softcap}, "
            f"{'no ' if head.bias is None else ''}bias"
        )
