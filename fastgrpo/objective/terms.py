"""What the loss knows about its rows, and what it makes of each."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastgrpo.objective.corrections import SamplerWeights
from fastgrpo_kernels import Upstream


class PolicyRows(NamedTuple):
    """What the loss knows about its rows besides their log-probs."""

    advantages: Tensor  # (n,)
    weights: Tensor  # (n,)
    old_logps: Tensor | None  # (n,)
    ref_logps: Tensor | None  # (n,)
    sampler_logps: Tensor | None  # (n,)
    sampler: SamplerWeights | None  # what is known of it before the rows are scored

    def __getitem__(self, index: slice) -> PolicyRows:  # type: ignore[override]
        return PolicyRows(*(None if x is None else x[index] for x in self))


class Terms(NamedTuple):
    """The loss, row by row."""

    loss: Tensor  # (n,)
    upstream: Upstream
    stats: Tensor  # (6,) the kernels' `STATS`
    log_ratio: Tensor  # (n,) at the ratio level
    sampler: SamplerWeights | None
