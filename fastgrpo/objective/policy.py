"""From log-probs to the loss and its derivative: everything that is O(tokens).

    log_ratio = logp - old_logp, bounded, then at the ratio level of the surrogate
    loss      = sum over tokens of
                weight * (multiplier * surrogate + beta * kl - entropy_coef * entropy)

The weights carry the aggregation and its normalizer; the multipliers are the sampler correction and
the masks that act on the policy loss alone. Rows are packed: masked ones are gone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.backend import Kernels
from fastgrpo.objective.config import LossConfig, needs_entropy
from fastgrpo.objective.contexts import CONTEXTS, Population
from fastgrpo.objective.corrections import sampler_gap, sampler_weights
from fastgrpo.objective.metrics import Known, measure
from fastgrpo.objective.segments import Segments
from fastgrpo.objective.terms import PolicyRows, Terms
from fastgrpo_kernels import STATS, Logps, TokenObjective, Tokens, Upstream


def nearest(
    old_logps: Tensor | None, sampler_logps: Tensor | None, ref_logps: Tensor | None
) -> Tensor | None:
    """Return the log-probs that are nearest to the policy's among those that are given."""
    return next((x for x in (old_logps, sampler_logps, ref_logps) if x is not None), None)


class PolicyLoss(NamedTuple):
    """The loss of all rows of a call."""

    loss: Tensor  # ()
    upstream: Upstream
    metrics: Tensor  # (len(METRICS), 2) value and the number of rows that it is a mean over


class Objective(NamedTuple):
    """The loss of some rows as the routes see it: a function from log-probs to their gradient."""

    config: LossConfig
    kernels: Kernels
    rows: PolicyRows
    segments: Segments | None  # of the rows; None where the loss is separable over them
    entropy_threshold: Tensor | None = None  # ()
    seed: int | None = None

    @property
    def with_entropy(self) -> bool:
        return needs_entropy(self.config)

    @property
    def entropy_gradient(self) -> bool:
        return self.config.entropy_coef != 0

    @property
    def may_drop_rows(self) -> bool:
        """A clipped token has no gradient; a KL term or an entropy bonus would give it one."""
        config = self.config
        return self.rows.old_logps is not None and not (config.beta or config.entropy_coef)

    @property
    def separable(self) -> bool:
        known = self.rows.sampler is not None or not self.config.corrects_sequences
        return self.config.separable and known

    @property
    def estimate(self) -> Tensor | None:
        rows = self.rows
        return nearest(rows.old_logps, rows.sampler_logps, rows.ref_logps)

    @property
    def magnitude(self) -> Tensor:
        config, rows = self.config, self.rows
        return rows.weights * (rows.advantages.abs() + config.beta + abs(config.entropy_coef))

    def upstream(self, chunk: slice, scored: Logps) -> Upstream:
        """Return the gradients of a chunk of the rows, where the loss is separable."""
        part = self._replace(rows=self.rows[chunk], segments=None)
        return policy_terms(part, scored).upstream

    def evaluate(self, scored: Logps) -> PolicyLoss:
        """Return the loss of all rows, its derivatives and its metrics."""
        terms = policy_terms(self, scored)
        metrics = measure(Known(scored, self.rows, terms))
        return PolicyLoss(terms.loss.sum(), terms.upstream, metrics)


def policy_terms(objective: Objective, scored: Logps) -> Terms:
    """Return the loss of rows and its derivatives with respect to log-probs and entropies."""
    config, rows, segments = objective.config, objective.rows, objective.segments
    logps, entropy = scored.logps, scored.entropy
    unbounded = _token_log_ratio(config, logps, rows)
    clamped = _clamped(config, unbounded)
    token_ratio = _bounded(config, clamped, rows.advantages)
    log_ratio = _at_level(config.ratio_level, token_ratio, segments)
    sampler = rows.sampler
    if sampler is None and config.needs_sampler:
        old = logps if rows.old_logps is None else rows.old_logps
        sampler = sampler_weights(config, sampler_gap(old, rows.sampler_logps), segments)
    selected = _high_entropy(config, entropy, objective.entropy_threshold)
    multipliers = _product(
        sampler and (sampler.kept if config.folds_correction else sampler.multipliers()),
        _near_the_sampler(config, logps, rows, segments),
        selected,
        dtype=logps.dtype,
    )
    context = None
    if config.rule.context is not None:
        correction = sampler.weights if sampler and config.correction != "none" else None
        population = Population(
            logps, token_ratio, rows.advantages, correction, segments, objective.seed
        )
        context = CONTEXTS[config.rule.context](config, population)
    plain = config.ratio_level in ("none", "token") and token_ratio is unbounded
    tokens = Tokens(
        logps, log_ratio, rows.advantages, rows.weights, multipliers, context, rows.ref_logps
    )
    terms = objective.kernels.token_loss(tokens, _token_objective(config), separate=not plain)
    loss, dlogps, stats = terms.loss, terms.dlogps, terms.stats
    if terms.dratio is not None:
        dratio = _from_level(config.ratio_level, terms.dratio, segments)
        dlogps = dlogps + torch.where(token_ratio == unbounded, dratio, 0.0)
    if config.surrogate == "gmpo":
        # Its bounds act on the tokens' log-ratios, before the kernel sees them.
        alive = rows.advantages != 0
        for name, moved in (
            ("clip_low", clamped < token_ratio),
            ("clip_high", clamped > token_ratio),
        ):
            stats[STATS.index(name)] = (moved & alive).sum()
    dentropy = None
    if config.entropy_coef:
        bonus = config.entropy_coef * rows.weights
        dentropy = -bonus if selected is None else -bonus * selected
        loss = loss + dentropy * entropy
    poison = _poison(config, scored, rows)
    return Terms(loss + poison, Upstream(dlogps + poison, dentropy), stats, log_ratio, sampler)


def _poison(config: LossConfig, scored: Logps, rows: PolicyRows) -> Tensor:
    """Return 0 (n,), or NaN where something that the loss reads is not finite.

    Bounds, masks and the choice between two values would make a number of it.
    """
    read = [scored.logps, rows.advantages]
    if config.ratio_level != "none" or config.needs_sampler:
        read.append(rows.old_logps)
    if config.beta:
        read.append(rows.ref_logps)
    if config.needs_sampler:
        # A NaN of the sampler says that it has no log-prob.
        read.append(rows.sampler_logps.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf))
    if config.entropy_coef:
        read.append(scored.entropy)
    return sum(0.0 * x for x in read if x is not None)


def _token_objective(config: LossConfig) -> TokenObjective:
    """Return the part of a config that the kernel of one token takes."""
    return TokenObjective(
        config.surrogate,
        config.parameters,
        config.kl,
        config.kl_gradient,
        config.beta,
        config.kl_input_clamp or math.inf,
        config.kl_output_clamp or math.inf,
    )


def _token_log_ratio(config: LossConfig, logps: Tensor, rows: PolicyRows) -> Tensor:
    """Return each token's log-ratio to the anchor, 0 where there is none."""
    anchor = rows.old_logps
    if config.anchor == "sampler" and rows.sampler_logps is not None:
        anchor = torch.where(rows.sampler_logps.isfinite(), rows.sampler_logps, logps)
    if anchor is None or config.ratio_level == "none":
        return torch.zeros_like(logps)
    return logps - anchor


def _clamped(config: LossConfig, log_ratio: Tensor) -> Tensor:
    """Return the log-ratio within `log_ratio_clamp`: the very tensor without one."""
    if config.log_ratio_clamp is None:
        return log_ratio
    return log_ratio.clamp(-config.log_ratio_clamp, config.log_ratio_clamp)


def _bounded(config: LossConfig, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Return the log-ratio within the surrogate's bounds: the very tensor where it sets none."""
    if config.surrogate == "gmpo":
        # PPO's pessimistic bound, taken token by token before the geometric mean.
        below, above = -config.epsilon_low, config.epsilon_high
        return torch.where(advantages > 0, log_ratio.clamp(max=above), log_ratio.clamp(min=below))
    return log_ratio


def _at_level(level: str, x: Tensor, segments: Segments | None) -> Tensor:
    """Return the log-ratio that a surrogate sees, from those of the tokens."""
    if level in ("sequence", "sequence_token"):
        return segments.mean(x)
    return segments.sum(x) if level == "sequence_sum" else x


def _from_level(level: str, gradient: Tensor, segments: Segments | None) -> Tensor:
    """Return the gradient of the tokens' log-ratios, from those of the rows at their level."""
    if level == "sequence":
        return segments.mean(gradient)
    return segments.sum(gradient) if level == "sequence_sum" else gradient


def _high_entropy(
    config: LossConfig, entropy: Tensor | None, threshold: Tensor | None
) -> Tensor | None:
    """Return the tokens (n,) bool that `top_entropy_quantile` selects, None if it is off."""
    if config.top_entropy_quantile == 1:
        return None
    if threshold is None and len(entropy):
        threshold = entropy.quantile(1 - config.top_entropy_quantile)
    return entropy >= threshold if len(entropy) else entropy.bool()


def _near_the_sampler(
    config: LossConfig, logps: Tensor, rows: PolicyRows, segments: Segments | None
) -> Tensor | None:
    """Return DeepSeek-V3.2's off-policy sequence mask (n,) bool, None if it is off."""
    if config.off_policy_mask_threshold is None:
        return None
    behaviour = rows.old_logps if rows.sampler_logps is None else rows.sampler_logps
    gap = torch.where(behaviour.isnan(), 0.0, behaviour - logps)
    return (rows.advantages >= 0) | (segments.mean(gap) <= config.off_policy_mask_threshold)


def _product(*factors: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    given = [x.to(dtype) for x in factors if x is not None]
    return math.prod(given[1:], start=given[0]) if given else None
