"""The loss of a micro-batch, made inside the model's forward where TRL would make log-probs."""

from __future__ import annotations

import functools
import types
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl import GRPOTrainer

from fastgrpo import grpo_loss
from fastgrpo.integrations.trl.chunked_head import HeadCall, Outputs, StandIn, standing_in
from fastgrpo.integrations.trl.settings import Inputs, loss_config, loss_mask, normalizer


class Completions(NamedTuple):
    """A micro-batch as `grpo_loss` takes it: (B, T), or packed (N,) with bounds."""

    token_ids: Tensor
    mask: Tensor  # bool
    advantages: Tensor  # (B,) or as token_ids
    old_logps: Tensor | None
    ref_logps: Tensor | None
    sampler_logps: Tensor | None
    cu_seqlens: Tensor | None = None

    def packed(self, scored: Tensor) -> Completions:
        """Return the tokens at `scored` (B, T) bool, without the sequences that have none."""
        lengths = scored.sum(1)
        # As indices: for each mask a GPU would wait for the host.
        sequences, tokens = lengths.nonzero()[:, 0], scored.flatten().nonzero()[:, 0]

        def at_tokens(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.flatten()[tokens]

        ids, mask, advantages, *logps, _ = self
        advantages = advantages[sequences] if advantages.dim() == 1 else at_tokens(advantages)
        bounds = pad(lengths[sequences].cumsum(0), (1, 0))
        return Completions(
            at_tokens(ids), at_tokens(mask), advantages, *map(at_tokens, logps), bounds
        )


class FusedLoss(StandIn):
    """Takes the head's operands and keeps their loss; what it returns is for TRL's metrics.

    Raises `NotFused` for a trainer with a setting that `grpo_loss` does not cover.
    """

    def __init__(self, trainer: GRPOTrainer, inputs: Inputs) -> None:
        self.config = loss_config(trainer, inputs)
        self.normalizer = normalizer(trainer, inputs)
        self.completions = Completions(
            inputs["completion_ids"],
            loss_mask(inputs),
            inputs["advantages"],
            inputs.get("old_per_token_logps"),
            inputs.get("ref_per_token_logps"),
            inputs.get("sampling_per_token_logps"),
        )
        self.scored = inputs["completion_mask"].bool()
        self.prompt_length = inputs["prompt_ids"].shape[1]
        self.loss: Tensor | None = None

    def apply(self, *args: object, **kwargs: object) -> Outputs:
        call = HeadCall(*args, **kwargs)
        hidden, weight, bias = call.operands()
        rows = self.completions
        sequences, length = rows.token_ids.shape
        # TRL's head takes the states of scored tokens alone, or all positions but the last.
        before = self.prompt_length - 1
        everywhere = len(hidden) == sequences * (before + length)
        if everywhere:
            hidden = hidden.view(sequences, before + length, -1)[:, before:]
        else:
            rows = rows.packed(self.scored)
        out = grpo_loss(
            hidden,
            weight,
            *rows[:3],
            old_logps=rows.old_logps,
            ref_logps=rows.ref_logps,
            sampler_logps=rows.sampler_logps,
            cu_seqlens=rows.cu_seqlens,
            normalizer=self.normalizer,
            config=self.config,
            bias=bias,
            **call.transform(),
        )
        self.loss = out.loss
        # What a tool wrote was not scored here. Away from its old log-prob TRL's ratio could
        # overflow, and infinity times a mask of 0 is NaN.
        old = torch.zeros_like(out.logps) if rows.old_logps is None else rows.old_logps
        logps, entropy = torch.where(rows.mask, out.logps, old), out.entropy
        if everywhere:
            logps, entropy = (pad(x, (before, 0)).flatten() for x in (logps, entropy))
        return logps, entropy, None, None, None


def add_fused_loss(model: PreTrainedModel) -> None:
    """Give a model with TRL's head a forward that takes a `FusedLoss` as `fused_loss`.

    The loss leaves with the outputs of the forward, so that what is wrapped around the model (DDP,
    autocast) sees an ordinary loss.
    """
    plain = model.forward

    # `generate` checks its arguments against the signature.
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel, *args: object, fused_loss: FusedLoss | None = None, **kwargs: object
    ) -> ModelOutput:
        if fused_loss is None:
            return plain(*args, **kwargs)
        with standing_in(fused_loss):
            outputs = plain(*args, **kwargs)
        outputs.loss = fused_loss.loss
        return outputs

    model.forward = types.MethodType(forward, model)
