"""Prompts and completions between text and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .completions import Rollout
from .model import Policy
from .tasks import TemplatedPrompt


def encode(policy: Policy, prompts: Sequence[str]) -> tuple[Tensor, ...]:
    """Return the ids of each prompt, P of (length,) int64, on the policy's device."""
    device = policy.head.weight.device
    return tuple(torch.tensor(ids, device=device) for ids in prompt_tokens(policy, prompts))


def prompt_tokens(policy: Policy, prompts: Sequence[str]) -> list[list[int]]:
    """Return each prompt's ids, with the special tokens that no template has written."""
    rows: dict[int, list[int]] = {}
    for templated in (False, True):
        picked = [i for i, p in enumerate(prompts) if isinstance(p, TemplatedPrompt) == templated]
        if picked:
            encoded = policy.tokenizer(
                [prompts[i] for i in picked], add_special_tokens=not templated
            )
            rows |= zip(picked, encoded["input_ids"], strict=True)
    return [rows[i] for i in range(len(prompts))]


def check_prompts(policy: Policy, prompts: Sequence[str], max_length: int) -> None:
    """Raise ValueError unless the model can read every prompt and ``max_length`` tokens after it.

    Nothing is cut or left out: a prompt without its end asks something else, and accuracy without
    the long prompts is another number.
    """
    rows = policy.model.get_input_embeddings().weight.shape[0]
    context = policy.model.config.get_text_config()
    context = getattr(context, "max_position_embeddings", None) or float("inf")
    if max_length >= context:
        raise ValueError(
            f"max_completion_length: expected below the model's context of {context}, "
            f"got {max_length}"
        )
    for prompt, ids in zip(prompts, prompt_tokens(policy, prompts), strict=True):
        shown = prompt if len(prompt) <= 80 else f"{prompt[:40]} ... {prompt[-40:]}"
        if max(ids, default=0) >= rows:
            raise ValueError(
                f"prompts: expected token ids below {rows}, the rows of the model's embedding, "
                f"got {max(ids)} in {shown!r}"
            )
        if not 0 < len(ids) <= context - max_length:
            raise ValueError(
                f"prompts: expected 1 to {context - max_length} tokens, the model's context of "
                f"{context} less max_completion_length {max_length}, got {len(ids)} in {shown!r}"
            )


def texts(policy: Policy, rollout: Rollout) -> list[str]:
    """Return the completions as text, without their end.

    Other special tokens stay: tags that are tokens of their own are among them.
    """
    ends = set(policy.end_ids)
    kept = [[i for i in ids.tolist() if i not in ends] for ids in rollout.completions()]
    return policy.tokenizer.batch_decode(kept, skip_special_tokens=False)


def demonstrate(policy: Policy, prompts: list[str], completions: list[str]) -> Rollout:
    """Return given texts as a rollout, each followed by the end-of-sequence token."""
    device = policy.head.weight.device
    encoded = policy.tokenizer(completions, add_special_tokens=False)["input_ids"]
    rows = [ids + policy.end_ids[:1] for ids in encoded]
    return Rollout(
        encode(policy, prompts),
        torch.arange(len(prompts), device=device),
        torch.tensor([i for row in rows for i in row], device=device),
        torch.tensor([len(row) for row in rows], device=device),
        torch.ones(len(rows), dtype=torch.bool, device=device),
    )
