"""Which values each field of a loss may have, and beside which others it has an effect."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastgrpo.checks import finite, one_of, positive, share
from fastgrpo.objective.fields import (
    AGGREGATIONS,
    ANCHORS,
    CORRECTIONS,
    ENTROPY_MODES,
    REJECTIONS,
    LossFields,
)
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS, KL_GRADIENTS
from fastgrpo_kernels.surrogates import RATIO_LEVELS, SURROGATES


def check_fields(config: LossFields) -> None:
    """Raise ValueError for a wrong value, and for one without effect beside the others."""
    _check_names(config)
    _check_numbers(config)
    _check_combination(config)


def own_parameters(config: LossFields) -> tuple[tuple[str, float], ...]:
    """Return `surrogate_parameters` as they are stored: all of them, in the function's order."""
    rule, given = config.rule, config.surrogate_parameters
    expected = f"a mapping of {list(rule.own)} to numbers with surrogate={config.surrogate!r}"
    if not isinstance(rule.parameters, Mapping):
        expected = (
            f"nothing with surrogate={config.surrogate!r}, whose parameters are the fields "
            f"{list(rule.fields)} of LossConfig"
        )
    try:
        given = dict(given)
    except (TypeError, ValueError):
        raise ValueError(f"surrogate_parameters: expected {expected}, got {given!r}") from None
    if not given.keys() <= rule.own.keys():
        raise ValueError(f"surrogate_parameters: expected {expected}, got {given}")
    values = {**rule.own, **given}
    return tuple((n, finite(f"surrogate_parameters[{n!r}]", x)) for n, x in values.items())


def _check_names(config: LossFields) -> None:
    one_of("ratio_level", config.ratio_level, RATIO_LEVELS)
    one_of("anchor", config.anchor, ANCHORS)
    one_of("aggregation", config.aggregation, AGGREGATIONS)
    one_of("correction", config.correction, tuple(CORRECTIONS))
    one_of("rejection", config.rejection, REJECTIONS)
    one_of("kl", config.kl, tuple(KL_ESTIMATORS))
    one_of("kl_gradient", config.kl_gradient, tuple(KL_GRADIENTS))
    one_of("entropy", config.entropy, ENTROPY_MODES)
    levels = config.rule.ratio_levels
    if config.ratio_level not in levels:
        raise ValueError(
            f"ratio_level: expected one of {list(levels)} with surrogate={config.surrogate!r}, "
            f"got {config.ratio_level!r}"
        )


def _check_numbers(config: LossFields) -> None:
    in_log_space = config.surrogate == "gmpo"
    finite("epsilon_low", config.epsilon_low, 0.0, math.inf if in_log_space else 1.0)
    if config.surrogate == "cispo_raw" and finite("epsilon_high", config.epsilon_high) <= 1.0:
        raise ValueError(
            "epsilon_high: expected a bound > 1 on the ratio itself with "
            f"surrogate='cispo_raw' (1 + epsilon, not epsilon), got {config.epsilon_high}"
        )
    for name in ("epsilon_high", "beta", "proximal_coef", "kl_cov_coef", "fipo_low"):
        finite(name, getattr(config, name), 0.0)
    for name in ("cov_low", "cov_high", "entropy_coef", "vespo_k_pos", "vespo_k_neg"):
        finite(name, getattr(config, name))
    for name in (
        "sapo_temperature_pos",
        "sapo_temperature_neg",
        "vespo_lambda_pos",
        "vespo_lambda_neg",
        "fipo_half_life",
    ):
        positive(name, getattr(config, name))
    for name in (
        "delta",
        "log_ratio_clamp",
        "fipo_safety_ratio",
        "correction_max",
        "rejection_min",
        "rejection_max",
        "kl_input_clamp",
        "kl_output_clamp",
    ):
        if getattr(config, name) is not None:
            positive(name, getattr(config, name))
    if config.off_policy_mask_threshold is not None:
        finite("off_policy_mask_threshold", config.off_policy_mask_threshold)
    if config.correction_min is not None:
        finite("correction_min", config.correction_min, 0.0)
    share("cov_ratio", config.cov_ratio)
    share("top_entropy_quantile", config.top_entropy_quantile)
    for low, high in (("cov_low", "cov_high"), ("fipo_low", "fipo_high")):
        if getattr(config, low) >= finite(high, getattr(config, high)):
            raise ValueError(
                f"{low}: expected less than {high}={getattr(config, high)}, "
                f"got {getattr(config, low)}"
            )
    if config.correction_bounds[0] > config.correction_bounds[1]:
        raise ValueError(
            f"correction_min: expected at most correction_max={config.correction_bounds[1]}, "
            f"got {config.correction_bounds[0]}"
        )
    length = config.max_completion_length
    is_count = isinstance(length, int) and not isinstance(length, bool) and length >= 1
    if length is not None and not is_count:
        raise ValueError(f"max_completion_length: expected an int >= 1, got {length!r}")


def _check_combination(config: LossFields) -> None:
    """Refuse a field that differs from its default and would be ignored."""
    of_some_surrogate = {name for rule in SURROGATES.values() for name in rule.fields}
    for name in sorted(of_some_surrogate - set(config.rule.fields)):
        _needs(config, name, False, f"surrogate={config.surrogate!r}")
    if config.surrogate == "kl_cov":
        _needs(config, "cov_ratio", config.kl_cov_coef != 0, "kl_cov_coef=0")
    for name in ("anchor", "log_ratio_clamp"):
        _needs(config, name, config.ratio_level != "none", "ratio_level='none'")
    fixed = config.aggregation == "fixed_length"
    _needs(config, "max_completion_length", fixed, f"aggregation={config.aggregation!r}")
    for name in ("correction_min", "correction_max"):
        _needs(config, name, config.correction != "none", "correction='none'")
    _needs(config, "rejection_max", config.rejection != "none", "rejection='none'")
    k1 = config.rejection.endswith("k1")
    _needs(config, "rejection_min", k1, f"rejection={config.rejection!r}")
    for name in ("kl", "kl_gradient", "kl_input_clamp", "kl_output_clamp"):
        _needs(config, name, config.beta != 0, "beta=0")
    if config.kl_gradient == "importance":
        _needs(config, "kl_gradient", config.ratio_level != "none", "ratio_level='none'")
        _expects(
            config,
            "kl_gradient",
            config.surrogate != "gmpo",
            "'value', 'straight_through' or "
            "'score_function' with surrogate='gmpo', whose ratio is bounded by the sign of A",
        )
    if config.kl_gradient == "straight_through":
        _needs(config, "kl_gradient", config.kl != "k2", "kl='k2'")
    _expects(
        config,
        "correction",
        config.anchor == "old" or config.correction == "none",
        "'none' with anchor='sampler', whose ratio contains it",
    )
    if config.surrogate == "dro":
        _expects(config, "proximal_coef", config.proximal_coef > 0, "a number > 0 with 'dro'")
        _expects(
            config,
            "log_ratio_clamp",
            config.log_ratio_clamp is None,
            "None with 'dro', part of whose gradient does not pass through the ratio",
        )
    if config.rejection != "none":
        given = config.rejection_max is not None
        _expects(config, "rejection_max", given, f"a bound as rejection is {config.rejection!r}")
        low, high = config.rejection_bounds
        if config.rejection_min is None:
            _expects(config, "rejection_max", low <= high, "at least 1, or a rejection_min")
        _expects(config, "rejection_min", low <= high, f"at most rejection_max={high}")
    _expects(
        config,
        "correction",
        not (config.folds_correction and CORRECTIONS[config.correction][0]),
        f"one of ['none', 'token_tis', 'icepop'] with surrogate={config.surrogate!r}, which "
        "multiplies it over the sequence",
    )


def _expects(config: LossFields, name: str, condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}; got {getattr(config, name)!r}")


def _needs(config: LossFields, name: str, condition: bool, otherwise: str) -> None:
    default = type(config).__dataclass_fields__[name].default
    if not condition and getattr(config, name) != default:
        raise ValueError(f"{name}={getattr(config, name)!r} has no effect with {otherwise}")
