"""What the loss is: a frozen `LossConfig` of independent choices, checked against each other.

Its fields are in `fastgrpo.objective.fields`, the checks in `fastgrpo.objective.rules`, names for
combinations in `fastgrpo.objective.presets`; docs/losses.md tabulates all of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import ClassVar

import torch

from fastgrpo.checks import one_of
from fastgrpo.objective.fields import LossFields
from fastgrpo.objective.presets import PRESETS
from fastgrpo.objective.rules import check_fields, own_parameters
from fastgrpo_kernels.surrogates import SURROGATES


@dataclass(frozen=True, kw_only=True)
class LossConfig(LossFields):
    """A loss of the GRPO family: GRPO by default; `LossConfig.preset(name)` gives the others.

    Raises ValueError for an unknown field or value, and for a field without effect in the
    combination, naming both.
    """

    key: ClassVar[str]
    """The fields as JSON: how a config travels through `torch.library` ops."""

    def __new__(cls, **given: object) -> LossConfig:
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"LossConfig has no field {name!r}; expected one of {known}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "surrogate_parameters", own_parameters(self))
        check_fields(self)
        # Made here, as `torch.compile` cannot trace what would make it later.
        object.__setattr__(self, "key", json.dumps(asdict(self)))

    @classmethod
    def preset(cls, name: str, **overrides: object) -> LossConfig:
        """Return the loss called `name` with fields replaced: `preset("dapo", beta=0.04)`."""
        if name in SURROGATES and name not in PRESETS:
            raise ValueError(
                f"config: expected a preset's name, got the surrogate's name {name!r}; pass "
                f"LossConfig(surrogate={name!r})"
            )
        one_of("config", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **overrides})


def needs_entropy(config: LossConfig) -> bool:
    """Whether entropies are computed. A function, as `torch.compile` reads no property."""
    return config.entropy != "none" or config.entropy_coef != 0 or config.top_entropy_quantile < 1


@torch.compiler.assume_constant_result
def config_of_preset(name: str) -> LossConfig:
    """Return the preset called `name`, as a constant where `torch.compile` traces the call."""
    return LossConfig.preset(name)


@lru_cache
def config_from_key(key: str) -> LossConfig:
    """Return the config that `LossConfig.key` describes."""
    return LossConfig(**json.loads(key))
