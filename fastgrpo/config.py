"""What the loss is: a frozen `LossConfig` and the presets that carry the papers' names.

A preset fixes three independent choices. The *surrogate* is the loss of one token, the *ratio
level* says which log-ratio it sees (the token's own or its sequence's mean), and the *aggregation*
weighs tokens:

    token_mean       sum over tokens / number of tokens
    sequence_mean    mean over sequences of the mean over their tokens
    fixed_length     sum over tokens / (B * max_completion_length)
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache

import torch

from fastgrpo_kernels.surrogates import KL_ESTIMATORS, SURROGATES

AGGREGATIONS = ("token_mean", "sequence_mean", "fixed_length")
ENTROPY_MODES = ("none", "detached", "differentiable")

PRESETS: dict[str, dict[str, object]] = {
    "reinforce": dict(surrogate="reinforce", ratio_level="none", aggregation="token_mean"),
    "ppo": dict(aggregation="sequence_mean"),
    "grpo": dict(aggregation="sequence_mean"),
    "bnpo": dict(aggregation="token_mean"),
    "dapo": dict(aggregation="token_mean", epsilon_high=0.28),
    "dr_grpo": dict(aggregation="fixed_length"),
    "cispo": dict(surrogate="cispo", aggregation="token_mean"),
    "gspo": dict(
        ratio_level="sequence",
        aggregation="sequence_mean",
        epsilon_low=3e-4,
        epsilon_high=4e-4,
    ),
}


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A loss of the GRPO family: GRPO by default; `LossConfig.preset(name)` gives the others.

    Raises ValueError for an unknown field or value, and for a field that the surrogate or the
    aggregation would ignore.
    """

    surrogate: str = "ppo_clip"
    """Loss of one token: "ppo_clip", "cispo" or "reinforce" (`fastgrpo_kernels.surrogates`)."""
    ratio_level: str = "token"
    """Which importance ratio it sees: "token", "sequence" (exp of the mean log-ratio) or "none"."""
    aggregation: str = "sequence_mean"
    """How tokens are weighed: "token_mean", "sequence_mean" or "fixed_length"."""
    epsilon_low: float = 0.2
    """The ratio is clipped below at 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """The ratio is clipped above at 1 + epsilon_high."""
    delta: float | None = None
    """Two-sided clip: for negative advantages the ratio counts as at most delta. None = off."""
    beta: float = 0.0
    """Weight of the per-token KL to the reference policy, added before aggregation."""
    kl: str = "k3"
    """Estimator of that KL: "k3" = exp(ref - logp) - (ref - logp) - 1."""
    entropy: str = "none"
    """What `GRPOLoss.entropy` holds: "none", "detached" or "differentiable" values."""
    entropy_coef: float = 0.0
    """Entropy bonus: the loss is lowered by this times the entropy, aggregated like the loss."""
    max_completion_length: int | None = None
    """L_max of "fixed_length"; may be left out when the call gives `normalizer`."""

    def __new__(cls, **given: object) -> LossConfig:
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"LossConfig has no field {name!r}; expected one of {known}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _one_of("surrogate", self.surrogate, tuple(SURROGATES))
        _one_of("ratio_level", self.ratio_level, SURROGATES[self.surrogate].ratio_levels)
        _one_of("aggregation", self.aggregation, AGGREGATIONS)
        _one_of("kl", self.kl, tuple(KL_ESTIMATORS))
        _one_of("entropy", self.entropy, ENTROPY_MODES)
        _number("epsilon_low", self.epsilon_low, 0.0, 1.0)
        _number("epsilon_high", self.epsilon_high, 0.0)
        _number("beta", self.beta, 0.0)
        _number("entropy_coef", self.entropy_coef)
        if self.delta is not None and _number("delta", self.delta) <= 0:
            raise ValueError(f"delta: expected a bound > 0 on the ratio, or None; got {self.delta}")
        self._refuse_fields_without_effect()

    def _refuse_fields_without_effect(self) -> None:
        used = SURROGATES[self.surrogate].uses
        defaults = {f.name: f.default for f in fields(self)}
        for name in ("epsilon_low", "epsilon_high", "delta"):
            if name not in used and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} has no effect with surrogate={self.surrogate!r}")
        length = self.max_completion_length
        if length is not None:
            if self.aggregation != "fixed_length":
                raise ValueError(
                    f"max_completion_length has no effect with aggregation={self.aggregation!r}"
                )
            if not isinstance(length, int) or length < 1:
                raise ValueError(f"max_completion_length: expected an int >= 1, got {length!r}")

    @classmethod
    def preset(cls, name: str, **overrides: object) -> LossConfig:
        """Return the loss called `name` with fields replaced: `preset("dapo", beta=0.04)`."""
        _one_of("config", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **overrides})

    @property
    def zero_advantage_is_inert(self) -> bool:
        """Whether a token with advantage 0 is known to have no gradient before it is scored."""
        return self.ratio_level != "sequence" and self.beta == 0 and self.entropy_coef == 0

    @cached_property
    def key(self) -> str:
        """The fields as JSON: how a config travels through `torch.library` ops."""
        return json.dumps(asdict(self))


@torch.compiler.assume_constant_result
def config_of_preset(name: str) -> LossConfig:
    """Return the preset called `name`, as a constant where `torch.compile` traces the call."""
    return LossConfig.preset(name)


@lru_cache
def config_from_key(key: str) -> LossConfig:
    """Return the config that `LossConfig.key` describes."""
    return LossConfig(**json.loads(key))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def _number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name}: expected a finite number in [{low}, {high}], got {value!r}")
    return float(value)
