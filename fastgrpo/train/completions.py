"""The batch of completions that the training loop samples, scores and learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastgrpo import Support


@dataclass(frozen=True)
class Rollout:
    """S completions of P prompts, N tokens in all, packed: nothing is padding.

    The completions of a prompt stand side by side; a group is a prompt with its completions. Every
    prompt has at least one token and one completion, every completion at least one token.
    """

    prompts: tuple[Tensor, ...]  # P of (length,) int64
    prompt_index: Tensor  # (S,) int64, ascending: the prompt of each completion
    token_ids: Tensor  # (N,) int64, one completion after the other
    lengths: Tensor  # (S,) int64, the end token included
    finished: Tensor  # (S,) bool: the last token is an end token; else it was cut
    sampler_logps: Tensor | None = None  # (N,) fp32, of the distribution that was sampled from
    support: Support | None = None  # (N,), what could have been sampled; None: the whole vocabulary
    old_logps: Tensor | None = None  # (N,) fp32
    ref_logps: Tensor | None = None  # (N,) fp32
    rewards: Tensor | None = None  # (S,) float64, NaN where there is none
    advantages: Tensor | None = None  # (S,) fp32

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each completion begins, and N: (S + 1,) int32."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).int()

    @property
    def completion_mask(self) -> Tensor:
        """The completions side by side from the left, (S, longest) bool: True at a token."""
        width = int(self.lengths.max())
        return torch.arange(width, device=self.lengths.device) < self.lengths[:, None]

    def completions(self) -> tuple[Tensor, ...]:
        """Return the token ids of each completion, S of (length,) int64."""
        return self.token_ids.split(self.lengths.tolist())

    def tokens_of(self, chosen: Tensor) -> Tensor:
        """Return which tokens are of the completions at `chosen` (K,) int64: (N,) bool."""
        kept = torch.zeros(len(self), dtype=torch.bool, device=self.lengths.device)
        kept[chosen] = True
        return kept.repeat_interleave(self.lengths)

    def __getitem__(self, chosen: Tensor) -> Rollout:
        """Return the completions at `chosen`, (K,) int64 ascending, with their prompts alone."""
        tokens = self.tokens_of(chosen)
        used, index = self.prompt_index[chosen].unique(return_inverse=True)
        picked: dict[str, Tensor | None] = {}
        for name in ("token_ids", "sampler_logps", "old_logps", "ref_logps"):
            value = getattr(self, name)
            picked[name] = None if value is None else value[tokens]
        for name in ("lengths", "finished", "rewards", "advantages"):
            value = getattr(self, name)
            picked[name] = None if value is None else value[chosen]
        support = None if self.support is None else self.support.select(tokens)
        prompts = tuple(self.prompts[i] for i in used.tolist())
        return Rollout(prompts, index, **picked, support=support)

    @property
    def live_groups(self) -> Tensor:
        """The groups with an advantage other than 0, (P,) bool: the others teach nothing."""
        live = torch.zeros(len(self.prompts), dtype=torch.bool, device=self.lengths.device)
        live[self.prompt_index[self.advantages != 0]] = True
        return live


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Return the groups of several rollouts, one after the other.

    What one of them lacks, such as ``ref_logps``, the result lacks too. But beside a ``support``
    the tokens of a rollout that has none keep the whole vocabulary.
    """
    counts = torch.tensor([len(rollout.prompts) for rollout in rollouts])
    starts = (counts.cumsum(0) - counts).tolist()
    joined: dict[str, Tensor | None] = {}
    for field in fields(Rollout)[2:]:
        if field.name == "support":
            continue
        parts = [getattr(rollout, field.name) for rollout in rollouts]
        joined[field.name] = None if any(x is None for x in parts) else torch.cat(parts)
    support = None
    if any(rollout.support is not None for rollout in rollouts):
        support = Support.cat([rollout.support or _whole(rollout) for rollout in rollouts])
    return Rollout(
        tuple(prompt for rollout in rollouts for prompt in rollout.prompts),
        torch.cat([r.prompt_index + start for r, start in zip(rollouts, starts, strict=True)]),
        **joined,
        support=support,
    )


def _whole(rollout: Rollout) -> Support:
    """Return the support of tokens that keep the whole vocabulary."""
    ids = rollout.token_ids.new_empty(0)
    return Support(ids, ids.new_zeros(len(rollout.token_ids) + 1))


def left_padded(sequences: Sequence[Tensor], padding: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids (P, longest) int64 that end in the last column, and where they are, bool."""
    ids = pad_sequence(
        list(sequences), batch_first=True, padding_value=padding, padding_side="left"
    )
    lengths = torch.tensor([len(s) for s in sequences], device=ids.device)
    places = torch.arange(ids.shape[1], device=ids.device)
    return ids, places >= ids.shape[1] - lengths[:, None]
