"""Sampling: prompts in, groups of completions out, as tensors and as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from fastgrpo.model.fused_lm import evaluation_mode

from .completions import Rollout
from .model import Policy
from .tasks import TemplatedPrompt


def encode(policy: Policy, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return ids (B, P) int64 and mask (B, P) bool, padded on the left."""
    encoded = policy.tokenizer.pad(
        {"input_ids": prompt_tokens(policy, prompts)}, padding_side="left", return_tensors="pt"
    )
    device = policy.head.weight.device
    return encoded["input_ids"].to(device), encoded["attention_mask"].bool().to(device)


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
    rows = policy.model.get_input_embeddings().num_embeddings
    context = policy.model.config.get_text_config()
    context = getattr(context, "max_position_embeddings", None) or float("inf")
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


def ends_at(ids: Tensor, eos_token_ids: Tensor) -> Tensor:
    """Return a (B, T) bool mask: True through the first end-of-sequence token of each row."""
    is_end = torch.isin(ids, eos_token_ids)
    return (is_end.cumsum(dim=1) - is_end.long()) == 0


@torch.no_grad()
def generate(
    policy: Policy, prompts: Sequence[str], max_length: int, temperature: float
) -> Rollout:
    """Return one completion of each prompt; temperature 0 decodes greedily."""
    prompt_ids, prompt_mask = encode(policy, prompts)
    end_ids = policy.end_ids
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    generation = GenerationConfig(
        max_new_tokens=max_length,
        do_sample=temperature > 0,
        pad_token_id=policy.tokenizer.pad_token_id,
        eos_token_id=end_ids,
        **sampling,
    )
    with evaluation_mode(policy.model):
        sequences = policy.model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            generation_config=generation,
        )
    completion_ids = sequences[:, prompt_ids.shape[1] :]
    completion_mask = ends_at(completion_ids, torch.tensor(end_ids, device=completion_ids.device))
    return Rollout(prompt_ids, prompt_mask, completion_ids, completion_mask)


def texts(policy: Policy, rollout: Rollout) -> list[str]:
    """Return the completions as text, without their end and padding.

    Other special tokens stay: tags that are tokens of their own are among them.
    """
    ends = torch.tensor(policy.end_ids, device=rollout.completion_ids.device)
    kept = rollout.completion_mask & ~torch.isin(rollout.completion_ids, ends)
    ids = [row[mask].tolist() for row, mask in zip(rollout.completion_ids, kept, strict=True)]
    return policy.tokenizer.batch_decode(ids, skip_special_tokens=False)


def demonstrate(policy: Policy, prompts: list[str], completions: list[str]) -> Rollout:
    """Return given texts as a rollout, each followed by the end-of-sequence token."""
    prompt_ids, prompt_mask = encode(policy, prompts)
    tokenizer = policy.tokenizer
    rows = [
        tokenizer(text, add_special_tokens=False)["input_ids"] + policy.end_ids[:1]
        for text in completions
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return Rollout(prompt_ids, prompt_mask, ids.to(prompt_ids.device), mask.to(prompt_ids.device))
