"""The loss that flags describe: a preset's name, and key=value for every field of LossConfig."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from fastgrpo import LossConfig

FIELDS = tuple(field.name for field in dataclasses.fields(LossConfig))


def loss_options(options: Sequence[str]) -> dict[str, Any]:
    """Return the fields that ``options`` set, each "key=value", as LossConfig's types.

    "none" is None where a field may be; a mapping is a JSON object. What is no field, or of another
    type, is a ValueError.
    """
    hints = typing.get_type_hints(LossConfig)
    values: dict[str, Any] = {}
    for option in options:
        name, separator, text = option.partition("=")
        if not separator or name not in FIELDS:
            raise ValueError(
                f"loss_option: expected key=value with a key among {list(FIELDS)}, got {option!r}"
            )
        if name == "beta":
            raise ValueError("loss_option: expected the weight of the KL as --beta, got it here")
        if name in values:
            raise ValueError(f"loss_option: expected {name} once, got it twice")
        values[name] = _value(name, text, hints[name])
    return values


def _value(name: str, text: str, hint: Any) -> Any:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    if type(None) in kinds and text.lower() == "none":
        return None
    kind = next(k for k in kinds if k is not type(None))
    convert = kind if kind in (int, float, str) else _mapping
    try:
        return convert(text)
    except ValueError as error:
        expected = " or ".join("none" if k is type(None) else str(k) for k in kinds)
        expected = kind.__name__ if kind in (int, float) else expected
        raise ValueError(f"loss_option {name}: expected {expected}, got {text!r}") from error


def _mapping(text: str) -> dict[str, float]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def loss_config(
    preset: str, options: Sequence[str], beta: float, max_completion_length: int
) -> LossConfig:
    """Return the loss; unless an option says otherwise, the entropy is computed as a metric only.

    A value that a loss does not take, or that has no effect beside the others, is a ValueError.
    """
    fields = {"beta": beta, "entropy": "detached"} | loss_options(options)
    aggregation = fields.get("aggregation", LossConfig.preset(preset).aggregation)
    if aggregation == "fixed_length":
        fields.setdefault("max_completion_length", max_completion_length)
    return LossConfig.preset(preset, **fields)
