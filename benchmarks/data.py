"""Make the batches that every provider is given: one seed, one set of tensors."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from benchmarks.profiles import Profile
from benchmarks.shapes import Shape
from fastgrpo import Support

# The share of the tokens from which the clip takes the gradient: about what a second pass over the
# same tokens meets after one update at learning rate 1e-5 (one_update in the profile).
CLIPPED = 0.02
# Standard deviation of what sets rows of one recorded curve apart, in nats of a logit.
APART = 0.25


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """The inputs of one GRPO loss: token mean, epsilon 0.2, beta 0."""

    hidden: Tensor  # (B, T, H), leaf that requires grad
    weight: Tensor  # (V, H), leaf; requires grad unless the head is frozen
    completion_ids: Tensor  # (B, T) int64
    completion_mask: Tensor  # (B, T) bool
    advantages: Tensor  # (B,) fp32
    old_logps: Tensor  # (B, T) fp32, nats
    skip_zero_advantage: bool = False  # no log-probs are wanted of tokens with advantage 0
    support: Support | None = None  # of tokens (B, T); None: the whole vocabulary

    def to(self, dtype: torch.dtype, *, frozen: bool = False) -> LossInputs:
        """Return the batch with fresh leaves in `dtype`; values are rounded if it is narrower."""
        return dataclasses.replace(
            self,
            hidden=self.hidden.detach().to(dtype).requires_grad_(),
            weight=self.weight.detach().to(dtype).requires_grad_(not frozen),
        )

    @classmethod
    def of_rows(
        cls,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        ids: Tensor,  # (N,)
        sequences: int,
        generator: torch.Generator,
        *,
        clipped: float = 0.0,
    ) -> LossInputs:
        """Return a batch of rows, a share `clipped` of which has no gradient, for the clip."""
        rows, device = len(ids), ids.device
        advantages = torch.randn(sequences, generator=generator, device=device)
        # Inside the clip range (log 0.8, log 1.2) by more than the noise that bf16 logits add, and
        # outside of it by as much, on the side where the advantage pushes on.
        drift = (torch.rand(rows, generator=generator, device=device) - 0.5) * 0.2
        chosen = torch.randperm(rows, generator=generator, device=device)[: round(clipped * rows)]
        length = rows // sequences
        drift[chosen] -= 0.45 * advantages.sign()[chosen // length]
        old_logps = _logps(hidden, weight, ids) + drift
        return cls(
            hidden=hidden.view(sequences, length, -1).requires_grad_(),
            weight=weight.requires_grad_(),
            completion_ids=ids.view(sequences, length),
            completion_mask=torch.ones(sequences, length, dtype=torch.bool, device=device),
            # No advantage so small that rounding decides whether its rows count as live.
            advantages=advantages + 0.25 * advantages.sign(),
            old_logps=old_logps.view(sequences, length),
        )

    def sequences(self, chosen: slice) -> LossInputs:
        """Return the batch of these completions, hidden states as a new leaf, the same weight."""
        return dataclasses.replace(
            self,
            hidden=self.hidden.detach()[chosen].clone().requires_grad_(),
            completion_ids=self.completion_ids[chosen],
            completion_mask=self.completion_mask[chosen],
            advantages=self.advantages[chosen],
            old_logps=self.old_logps[chosen],
            support=None if self.support is None else self.support.select(chosen),
        )


def random_batch(
    shape: Shape,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    clipped: float = CLIPPED,
    seed: int = 0,
) -> LossInputs:
    """Return an off-policy batch: a few ratios are clipped, all other rows have a gradient.

    The hidden states lean towards their target's classifier row, so that the targets'
    probabilities spread from about exp(-12) to almost 1 instead of all being 1/V.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = normal(shape.vocab, shape.hidden).div_(math.sqrt(shape.hidden)).to(dtype)
    ids = torch.randint(shape.vocab, (shape.rows,), generator=generator, device=device)
    lean = (
        torch.rand(shape.rows, 1, generator=generator, device=device) * 1.5 * math.log(shape.vocab)
    )
    hidden = (normal(shape.rows, shape.hidden) + lean * weight[ids].float()).to(dtype)
    return LossInputs.of_rows(hidden, weight, ids, shape.sequences, generator, clipped=clipped)


def profile_batch(
    shape: Shape,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    profile: Profile,
    clipped: float = CLIPPED,
    seed: int = 0,
) -> LossInputs:
    """Return a batch whose rows have the probabilities of `profile`'s, at a head of any shape.

    There are H recorded curves. Each is laid over the vocabulary in a random order of its own, and
    so gives one logit to every token. These (V, H) logits, turned by a random rotation, are the
    weight. A hidden state picks one of the curves, and adds a little of all the others. Rows of
    every curve come equally often, and tokens are drawn from their rows.
    """
    generator = torch.Generator(device).manual_seed(seed)
    n, v, h = shape.rows, shape.vocab, shape.hidden
    curves = profile.extended(v).to(device)
    curves = curves - curves.mean(1, keepdim=True)
    spread = curves.square().mean(1).sqrt()
    # Directions of the head, in the order of their curves' entropy.
    of_direction = (torch.arange(h, device=device) + 0.5).div(h).mul(len(curves)).long()
    logits = torch.empty(h, v, device=device)
    for direction, curve in zip(logits, of_direction, strict=True):
        order = torch.randperm(v, generator=generator, device=device)
        direction[order] = curves[curve] / spread[curve]
    turn = torch.linalg.qr(torch.randn(h, h, generator=generator, device=device)).Q
    weight = (logits.T @ turn).div_(math.sqrt(h)).to(dtype)

    states = torch.randn(n, h, generator=generator, device=device) * (APART / math.sqrt(h))
    rows = torch.randperm(n, generator=generator, device=device)
    picked = (torch.arange(n, device=device) + 0.5).div(n).mul(h).long()
    states[rows, picked] = spread[of_direction[picked]]
    hidden = (states @ turn).mul_(math.sqrt(h)).to(dtype)

    classifier = weight.float().T
    drawn = [
        torch.multinomial((block.float() @ classifier).softmax(-1), 1, generator=generator)
        for block in hidden.split(512)
    ]
    ids = torch.cat(drawn)[:, 0]
    return LossInputs.of_rows(hidden, weight, ids, shape.sequences, generator, clipped=clipped)


def rl_batch(batch: LossInputs, zero_advantage: float = 0.5, padding: float = 0.0) -> LossInputs:
    """Return `batch` with advantages of 0 and padding, as reinforcement learning meets them.

    A share `zero_advantage` of the completions gets advantage 0, like groups whose rewards are all
    equal. These are the first ones; at least one completion keeps its advantage. Lengths fall
    evenly from T to (1 - 2 * padding) * T, so that a share `padding` of all positions is padding.
    """
    sequences, length = batch.completion_ids.shape
    advantages = batch.advantages.clone()
    advantages[: min(round(zero_advantage * sequences), sequences - 1)] = 0.0
    steps = torch.arange(sequences, device=advantages.device) / max(sequences - 1, 1)
    lengths = (length * (1 - 2 * padding * steps)).round().long()
    mask = torch.arange(length, device=advantages.device) < lengths[:, None]
    return dataclasses.replace(batch, advantages=advantages, completion_mask=mask)


@torch.no_grad()
def _logps(hidden: Tensor, weight: Tensor, ids: Tensor, rows: int = 512) -> Tensor:
    """Return fp32 log-probs of `ids`, a block of rows at a time."""
    blocks = []
    for start in range(0, hidden.shape[0], rows):
        logits = hidden[start : start + rows].float() @ weight.float().T
        target = logits.gather(1, ids[start : start + rows, None])[:, 0]
        blocks.append(target - logits.logsumexp(-1))
    return torch.cat(blocks)
