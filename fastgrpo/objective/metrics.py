"""What a loss tells about itself: one entry of `METRICS` per number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.objective.config import LossConfig, needs_entropy
from fastgrpo.objective.terms import PolicyRows, Terms
from fastgrpo_kernels import STATS, Logps
from fastgrpo_kernels.kl_estimators import k3
from fastgrpo_kernels.twins import torch_twin

LARGEST_IMPORTANCE = 1e15  # so that squares do not overflow


@dataclass(frozen=True)
class Known:
    """What is known of n rows once their loss is."""

    scored: Logps
    rows: PolicyRows
    terms: Terms

    def stat(self, name: str) -> Tensor:
        """Return one of `STATS`, ()."""
        return self.terms.stats[STATS.index(name)]

    @cached_property
    def importance(self) -> Tensor:
        """ratio * correction (n,)."""
        ratio = self.terms.log_ratio.clamp(max=80).exp()
        w = ratio if self.terms.sampler is None else ratio * self.terms.sampler.multipliers()
        return w.clamp(max=LARGEST_IMPORTANCE)

    def mean(self, x: Tensor | None, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean of x (n,), or of the sum x () that it stands for, and its count."""
        logps = self.scored.logps
        if x is None:
            return logps.new_zeros(()), logps.new_zeros(())
        count = logps.new_full((), len(logps)) if count is None else count.to(logps.dtype)
        total = x if x.dim() == 0 else x.sum(dtype=logps.dtype)
        return (total / count.clamp(min=1)).to(logps.dtype), count

    def value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a number that is no mean, and the number of rows."""
        logps = self.scored.logps
        return x.to(logps.dtype), logps.new_full((), len(logps))

    def divergence(
        self, other: Tensor | None, where: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the k3 estimate of KL(other || policy), over the rows `where` (n,) bool."""
        if other is None:
            return self.mean(None)
        x = self.scored.logps - other
        known = torch.ones_like(x, dtype=torch.bool) if where is None else where
        return self.mean(torch_twin(k3)(torch.where(known, x, 0.0))[0], known.sum())

    def effective_sample_size(self) -> tuple[Tensor, Tensor]:
        w = self.importance
        squares = (len(w) * w.square().sum()).clamp(min=torch.finfo(w.dtype).tiny)
        return self.value(w.sum().square() / squares)


class Given(NamedTuple):
    """Which log-probs a call gave."""

    ref_logps: bool
    sampler_logps: bool


def _always(config: LossConfig, given: Given) -> bool:
    return True


class Metric(NamedTuple):
    """A number with the count of rows that it is a mean over; the count is 0 if it is unknown."""

    of: Callable[[Known], tuple[Tensor, Tensor]]
    reported: Callable[[LossConfig, Given], bool] = _always
    """Whether a call with this loss and these log-probs has anything to tell."""


def _corrects(config: LossConfig, given: Given) -> bool:
    return config.correction != "none"


def _stat(name: str) -> Callable[[Known], tuple[Tensor, Tensor]]:
    return lambda known: known.mean(known.stat(name))


METRICS: dict[str, Metric] = {
    "ratio_mean": Metric(_stat("ratio")),
    "ratio_min": Metric(lambda known: known.value(known.stat("ratio_min"))),
    "ratio_max": Metric(lambda known: known.value(known.stat("ratio_max"))),
    "clip_low": Metric(_stat("clip_low")),
    "clip_high": Metric(_stat("clip_high")),
    "clip_region": Metric(
        lambda known: known.mean(known.stat("clip_low") + known.stat("clip_high"))
    ),
    "approx_kl": Metric(
        lambda known: known.divergence(
            known.scored.logps if known.rows.old_logps is None else known.rows.old_logps
        )
    ),
    "kl": Metric(
        lambda known: known.mean(None if known.rows.ref_logps is None else known.stat("kl")),
        lambda config, given: given.ref_logps,
    ),
    "sampler_kl": Metric(
        lambda known: known.divergence(
            known.rows.sampler_logps,
            None if known.rows.sampler_logps is None else ~known.rows.sampler_logps.isnan(),
        ),
        lambda config, given: given.sampler_logps,
    ),
    "importance_mean": Metric(lambda known: known.mean(known.importance)),
    "importance_square": Metric(lambda known: known.mean(known.importance.square())),
    "ess": Metric(lambda known: known.effective_sample_size()),
    "correction_mean": Metric(
        lambda known: known.mean(known.terms.sampler and known.terms.sampler.weights), _corrects
    ),
    "correction_clipped": Metric(
        lambda known: known.mean(known.terms.sampler and known.terms.sampler.truncated), _corrects
    ),
    "rejected": Metric(
        lambda known: known.mean(known.terms.sampler and ~known.terms.sampler.kept),
        lambda config, given: config.rejection != "none",
    ),
    "live_rows": Metric(lambda known: known.mean(known.terms.upstream.alive())),
    "entropy": Metric(
        lambda known: known.mean(known.scored.entropy),
        lambda config, given: needs_entropy(config),
    ),
}


def measure(known: Known) -> Tensor:
    """Return value and count of every metric (len(METRICS), 2)."""
    return torch.stack([torch.stack(metric.of(known)) for metric in METRICS.values()])
