"""Sampling: prompts in, groups of completions out. Another engine is one class with one method."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from fastgrpo.model.own_forward import HALF_TOLERANCE, TOLERANCES, evaluation_mode

from .completions import Rollout, left_padded
from .kept_ids import KeptIds
from .kv_cache import can_prefill, prefill
from .model import Policy
from .sampling import Sampling, choose, uniforms_of

LEAVING = 1 / 8  # share of finished rows that is worth a copy of the other rows' cache


class Sampler(Protocol):
    """What the loop needs of an inference engine."""

    def sample(
        self, prompts: Sequence[Tensor], num_generations: int, sampling: Sampling
    ) -> Rollout:
        """Return ``num_generations`` completions of each prompt, drawn from the current weights.

        Args:
            prompts: P of (length,) int64 on the policy's device, each of at least one token.
            num_generations: the completions of a group, at least 1.
            sampling: how they are drawn.

        The rollout has these prompts in this order, tokens up to and including an end token,
        ``finished``, and ``sampler_logps``: log-probs of the tokens under the distribution that was
        sampled from, with temperature and processors, NaN where the engine reports none. Its
        ``support`` is what top-k, top-p or min-p kept for each token; without one the loss takes
        the softmax over the whole vocabulary. An engine with weights of its own copies the policy's
        here whenever they have changed.
        """
        ...


class ModelSampler:
    """Samples from the policy's own model: no weights to copy, and the trainer's arithmetic.

    Each prompt is read once per group, and finished rows leave the batch. Where a model's cache
    does not allow that (the first call tries it on a few tokens), transformers' ``generate``
    samples instead, and a line on stderr says why.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._checked = False
        self._decode = self._with_cache

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Tensor], num_generations: int, sampling: Sampling
    ) -> Rollout:
        """As ``Sampler.sample``; ValueError for no prompts, an empty one or an empty group."""
        if not prompts or not all(map(len, prompts)):
            lengths = [len(prompt) for prompt in prompts]
            raise ValueError(f"prompts: expected at least one token each, got lengths {lengths}")
        if num_generations < 1:
            raise ValueError(f"num_generations: expected at least 1, got {num_generations}")
        uniforms = None
        if sampling.temperature:
            drawn = uniforms_of(prompts, num_generations, sampling)
            uniforms = drawn.to(prompts[0].device)
        kept = None
        if sampling.filters:
            count = len(prompts) * num_generations
            kept = KeptIds(count, sampling.max_length, prompts[0].device)
        with evaluation_mode(self.policy.model):
            if not self._checked:
                self._choose_decoder()
            ids, logps = self._decode(prompts, num_generations, sampling, uniforms, kept)
        ends = torch.tensor(self.policy.end_ids, device=ids.device)
        mask = ends_at(ids, ends)
        index = torch.arange(len(prompts), device=ids.device).repeat_interleave(num_generations)
        return Rollout(
            tuple(prompts),
            index,
            ids[mask],
            mask.sum(dim=1),
            finished=(mask & torch.isin(ids, ends)).any(dim=1),
            sampler_logps=logps[mask],
            support=None if kept is None else kept.support(mask),
        )

    def _with_cache(
        self,
        prompts: Sequence[Tensor],
        num_generations: int,
        sampling: Sampling,
        uniforms: Tensor | None,  # (S, T) fp64
        kept: KeptIds | None,
    ) -> tuple[Tensor, Tensor]:
        """Return token ids and log-probs (S, T), anything behind an end token.

        ``kept`` gets what every step keeps.
        """
        model, padding = self.policy.model, self.policy.tokenizer.pad_token_id
        ends = torch.tensor(self.policy.end_ids, device=prompts[0].device)
        processors = sampling.all_processors()
        logits, cache = prefill(model, prompts, num_generations, padding, sampling.max_length)
        count, length = len(logits), sampling.max_length
        ids = torch.full((count, length), padding, device=ends.device)
        logps = torch.zeros(count, length, device=ends.device)
        context, mask = (
            x.repeat_interleave(num_generations, dim=0) for x in left_padded(prompts, padding)
        )
        padded, positions = not mask.all(), mask.sum(dim=1)
        samples, done = torch.arange(count, device=ends.device), torch.zeros_like(mask[:, 0])
        for place in range(length):
            scores = processors(context, logits.float(), samples=samples)
            if kept is not None:
                kept.add(scores, samples, place)
            tokens, found = choose(scores, None if uniforms is None else uniforms[samples, place])
            ids[samples, place], logps[samples, place] = tokens, found
            done |= torch.isin(tokens, ends)
            finished = int(done.sum())
            if finished == len(done) or place + 1 == length:
                break
            context = torch.cat((context, tokens[:, None]), dim=1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            if finished >= LEAVING * len(done):
                going_on = (~done).nonzero()[:, 0]
                cache.batch_select_indices(going_on)
                context, mask, positions, samples, done = (
                    x[going_on] for x in (context, mask, positions, samples, done)
                )
            logits = model(
                input_ids=context[:, -1:],
                attention_mask=mask.long() if padded else None,
                position_ids=positions[:, None] + place,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        return ids, logps

    def _with_generate(
        self,
        prompts: Sequence[Tensor],
        num_generations: int,
        sampling: Sampling,
        uniforms: Tensor | None,  # (S, T) fp64
        kept: KeptIds | None,
    ) -> tuple[Tensor, Tensor]:
        """As ``_with_cache``; T is the longest completion here."""
        padding = self.policy.tokenizer.pad_token_id
        ids, mask = left_padded(prompts, padding)
        choice = _Choice(sampling.all_processors(), uniforms, kept)
        sequences = self.policy.model.generate(
            input_ids=ids.repeat_interleave(num_generations, dim=0),
            attention_mask=mask.long().repeat_interleave(num_generations, dim=0),
            logits_processor=LogitsProcessorList([choice]),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_length,
                do_sample=False,
                pad_token_id=padding,
                eos_token_id=self.policy.end_ids,
            ),
        )
        return sequences[:, ids.shape[1] :], torch.stack(choice.logps, dim=1)

    def _choose_decoder(self) -> None:
        """Sample a few tokens with the cache, and compare with passes that have none."""
        self._checked = True
        try:
            problem = self._problem()
        except Exception as error:  # whatever another model's code raises
            problem = f"{type(error).__name__}: {error}"
        if problem:
            name = type(self.policy.model).__name__
            print(f"sampling from {name} with generate: {problem}", file=sys.stderr)
            self._decode = self._with_generate

    def _problem(self) -> str | None:
        model = self.policy.model
        if not can_prefill(model):
            return "its layers keep more than keys and values"
        weight = self.policy.head.weight
        vocab = torch.arange(len(weight), device=weight.device)
        prompts, group, sampling = (vocab[:2], vocab[-5:]), 2, Sampling(max_length=3)
        uniforms = torch.linspace(0.1, 0.9, 12, device=weight.device).double().view(4, 3)
        ids, logps = self._with_cache(prompts, group, sampling, uniforms, None)
        gap = 0.0
        for i, completion in enumerate(ids):
            prompt = prompts[i // group]
            whole = torch.cat((prompt, completion))[None]
            logits = model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0]
            scored = logits.float()[len(prompt) - 1 : -1].log_softmax(-1)
            expected = scored.gather(-1, completion[:, None])[:, 0]
            ended = torch.isin(completion, torch.tensor(self.policy.end_ids, device=ids.device))
            counted = ended.cumsum(0) - ended.long() == 0
            gap = max(gap, (logps[i] - expected)[counted].abs().max().item())
        if not gap <= TOLERANCES.get(model.dtype, HALF_TOLERANCE):
            return f"with its cache a log-prob is {gap:.2g} nats from that of a pass without"
        return None


class _Choice(LogitsProcessor):
    """Chooses the next tokens, leaves ``generate`` no other, and records their log-probs."""

    def __init__(
        self, processors: LogitsProcessorList, uniforms: Tensor | None, kept: KeptIds | None
    ) -> None:
        self.processors, self.uniforms, self.kept = processors, uniforms, kept
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        samples = torch.arange(len(scores), device=scores.device)
        scores = self.processors(input_ids, scores.float(), samples=samples)
        place = len(self.logps)
        if self.kept is not None:
            self.kept.add(scores, samples, place)
        uniforms = None if self.uniforms is None else self.uniforms[:, place]
        tokens, found = choose(scores, uniforms)
        self.logps.append(found)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)


def ends_at(ids: Tensor, ends: Tensor) -> Tensor:
    """Return a (B, T) bool mask: True through the first of the ``ends`` (E,) in each row."""
    is_end = torch.isin(ids, ends)
    return (is_end.cumsum(dim=1) - is_end.long()) == 0
