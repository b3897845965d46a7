"""Checks of single values: errors that name the argument, what was expected and what came."""

from __future__ import annotations

import math


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def finite(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """Return a number within [low, high] as a float."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        bounds = "" if low == -math.inf and high == math.inf else f" in [{low}, {high}]"
        raise ValueError(f"{name}: expected a finite number{bounds}, got {value!r}")
    return float(value)


def positive(name: str, value: object) -> None:
    if finite(name, value) <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")


def share(name: str, value: object) -> None:
    if not 0 < finite(name, value) <= 1:
        raise ValueError(f"{name}: expected a share in (0, 1], got {value!r}")
