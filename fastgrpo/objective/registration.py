"""`register_surrogate`: a policy loss from outside the package, under a name of its own."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from fastgrpo.checks import finite, one_of
from fastgrpo.objective.derivative_check import check_derivative
from fastgrpo.objective.fields import LossFields
from fastgrpo_kernels.runtime import HAS_TRITON, jit, tl
from fastgrpo_kernels.surrogates import CONTEXT_FIELDS, RATIO_LEVELS, SLOPES, SURROGATES, Surrogate
from fastgrpo_kernels.twins import called_by

_TENSORS = ("logp", "log_ratio", "advantage", "context")


def register_surrogate(
    name: str,
    fn: Callable,
    formula: Callable[..., Tensor],
    parameters: Mapping[str, float] | None = None,
    *,
    ratio_levels: tuple[str, ...] = ("token", "sequence", "sequence_sum"),
    slope: str = "ratio",
    context: str | None = None,
    inert: bool = True,
) -> None:
    """Make a policy loss of your own a `LossConfig.surrogate`, on every backend.

        def squared_gap(logp, log_ratio, advantage, context, step):
            gap = log_ratio - step * advantage
            return 0.5 * gap * gap, gap, advantage * 0.0  # L, dL/dlog_ratio, clipped

        def squared_gap_formula(logp, log_ratio, advantage, context, step):
            return (log_ratio - step * advantage) ** 2 / 2

        register_surrogate(
            "squared_gap", squared_gap, squared_gap_formula, {"step": 0.5}, inert=False
        )
        config = LossConfig(surrogate="squared_gap", surrogate_parameters={"step": 0.2})

    Value and slope of fn are checked here against the formula and its autograd, in float64, at
    every ratio level and at advantages of either sign and 0. Each process imports the module that
    registers. Registering the same function again, as a reload of its module does, replaces it.

    Args:
        name: what `LossConfig.surrogate` is to be; not one that is taken.
        fn: fn(logp, log_ratio, advantage, context, *parameters) -> (L, slope, clipped). Tensors are
            (n,), a number per token: fp32 in a kernel, fp32 or float64 in torch. The slope is
            dL/dlog_ratio. clipped is -1 where a lower bound took effect, 1 where an upper one did,
            else 0. Triton compiles the source, so fn lives in a file. In torch `tl` is torch: keep
            to what both have, and to `clip`, `outside`, `choose` and `bounded_exp` of
            `fastgrpo_kernels.twins`. What fn calls is decorated with
            `fastgrpo_kernels.runtime.jit`; fn itself may be.
        formula: formula(the same arguments) -> L (n,), in plain torch, differentiable.
        parameters: what fn takes after its tensors, in its order: {name: default}, finite numbers.
            `LossConfig(surrogate_parameters={name: value})` sets them.
        ratio_levels: the values of `LossConfig.ratio_level` that it is meant for.
        slope: "ratio": the gradient of L passes through log_ratio alone. "logp": it passes through
            logp alone, the slope is dL/dlogp, and the formula detaches the ratio.
        context: the rule that gives each token the constant `context`: a key of
            `fastgrpo_kernels.surrogates.CONTEXT_FIELDS`, which lists the fields of `LossConfig`
            that it reads. None: `context` is 0.
        inert: whether tokens with advantage 0 have neither loss nor gradient. If so, they are left
            out.

    Raises:
        ValueError: for a name that is taken, for anything of the above that is not as it says, and
            for a wrong value or slope, naming the input, what was expected and what came.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a string, got {name!r}")
    own = _parameters({} if parameters is None else parameters)
    levels = _levels(ratio_levels, slope)
    if context is not None:
        one_of("context", context, tuple(CONTEXT_FIELDS))
    source = _source(fn, own)
    _check_formula(formula, own)
    _check_name(name, source)
    # What is decorated already stays what it is.
    device_function = jit(fn) if fn is source else fn
    surrogate = Surrogate(device_function, formula, own, levels, slope, context, inert=bool(inert))
    check_derivative(surrogate)
    SURROGATES[name] = surrogate


def _parameters(given: object) -> Mapping[str, float]:
    """Return the parameters with their defaults, immutable."""
    if not isinstance(given, Mapping):
        raise ValueError(f"parameters: expected a mapping of names to defaults, got {given!r}")
    fields = {field.name for field in dataclasses.fields(LossFields)}
    for name in given:
        if name in fields:
            raise ValueError(
                f"parameters: expected names that LossConfig has no field of, got {name!r}"
            )
    return types.MappingProxyType(
        {name: finite(f"parameters[{name!r}]", value) for name, value in given.items()}
    )


def _levels(given: object, slope: str) -> tuple[str, ...]:
    one_of("slope", slope, SLOPES)
    if not isinstance(given, (tuple, list)) or not given:
        raise ValueError(f"ratio_levels: expected some of {list(RATIO_LEVELS)}, got {given!r}")
    for level in given:
        one_of("ratio_levels", level, RATIO_LEVELS)
    if slope == "ratio" and "none" in given:
        raise ValueError("ratio_levels: expected a ratio with slope='ratio', got 'none'")
    return tuple(given)


def _source(fn: object, own: Mapping[str, float]) -> types.FunctionType:
    """Return the Python function under fn, after a look at what Triton asks of it."""
    source = getattr(fn, "fn", fn)
    if not isinstance(source, types.FunctionType) or source.__name__ == "<lambda>":
        raise ValueError(f"fn: expected a function that def makes, got {fn!r}")
    names = tuple(inspect.signature(source).parameters)
    if len(names) < len(_TENSORS) or names[len(_TENSORS) :] != tuple(own):
        raise ValueError(
            f"fn: expected the arguments ({', '.join((*_TENSORS, *own))}), whose last are those of "
            f"parameters, got ({', '.join(names)})"
        )
    if source.__code__.co_freevars:
        raise ValueError(
            f"fn: expected no variables of a function around {source.__name__}, got "
            f"{list(source.__code__.co_freevars)}; make them parameters"
        )
    try:
        inspect.getsource(source)
    except OSError:
        raise ValueError(
            f"fn: expected a function defined in a file, for Triton compiles its source; got "
            f"{source.__name__} of {source.__code__.co_filename}. Write it to a module and import "
            "that"
        ) from None
    _check_language(source)
    return source


def _check_language(source: types.FunctionType) -> None:
    """Raise ValueError for what Triton does not compile, in a function and in those it calls."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(source)))
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            raise ValueError(f"fn: expected no power (**) in {source.__name__}; write x * x for it")
        of_tl = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if of_tl and node.value.id == "tl" and HAS_TRITON and not hasattr(tl, node.attr):
            raise ValueError(
                f"fn: expected functions that triton.language has in {source.__name__}, got "
                f"tl.{node.attr}"
            )
    for function in called_by(source).values():
        _check_language(getattr(function, "fn", function))


def _check_formula(formula: object, own: Mapping[str, float]) -> None:
    if not callable(formula):
        raise ValueError(f"formula: expected a function, got {formula!r}")
    try:
        inspect.signature(formula).bind(*_TENSORS, *own)
    except TypeError as error:
        raise ValueError(
            f"formula: expected the arguments ({', '.join((*_TENSORS, *own))}), got "
            f"{inspect.signature(formula)}: {error}"
        ) from None


def _check_name(name: str, source: types.FunctionType) -> None:
    """Raise ValueError if the name is another loss's."""
    if name not in SURROGATES:
        return
    known = SURROGATES[name]
    before = getattr(known.fn, "fn", known.fn)
    # A reloaded module, a notebook's cell run again; a script that is imported as a module too.
    same = source.__qualname__ == before.__qualname__ and (
        source.__module__ == before.__module__ or _file(source) == _file(before)
    )
    if not same or not isinstance(known.parameters, Mapping):
        raise ValueError(
            f"name: expected one that is not taken, got {name!r}, which is "
            f"{before.__module__}.{before.__qualname__}"
        )


def _file(source: types.FunctionType) -> Path:
    return Path(source.__code__.co_filename).resolve()
