"""One source for Triton and torch: device functions that also run on tensors."""

from __future__ import annotations

import builtins
import dis
import types
from collections.abc import Callable
from functools import lru_cache

import torch

from .runtime import jit, tl


@lru_cache
def torch_twin(fn: Callable) -> Callable:
    """Return `fn` as a function of torch tensors of any floating dtype, from the same source.

    `tl` becomes torch, and the functions that it calls become their twins. So `fn` may only use
    names that `tl` and torch share.
    """
    source = getattr(fn, "fn", fn)
    scope = {name: torch_twin(function) for name, function in called_by(source).items()}
    scope |= {"tl": torch, "__builtins__": builtins}
    return types.FunctionType(source.__code__, scope, source.__name__)


def called_by(source: types.FunctionType) -> dict[str, Callable]:
    """Return the global functions that a function calls, under the names that it uses for them."""
    loaded = {i.argval for i in dis.get_instructions(source) if i.opname == "LOAD_GLOBAL"}
    found = {name: source.__globals__.get(name) for name in loaded - {"tl"}}
    return {
        name: x for name, x in found.items() if isinstance(getattr(x, "fn", x), types.FunctionType)
    }


@jit
def bounded_exp(x):
    """exp(min(x, 80)): at most e^80 = 5e34 and never inf, so that 0 * inf cannot arise."""
    return tl.exp(tl.where(x > 80.0, 80.0, x))


@jit
def clip(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@jit
def outside(x, low, high):
    """-1 below, 1 above, 0 within the bounds."""
    zero = tl.zeros_like(x)
    return tl.where(x > high, zero + 1.0, tl.where(x < low, zero - 1.0, zero))


@jit
def choose(condition, a, b, like):
    """The number a or b in the dtype of `like`: torch.where of two numbers would be fp32."""
    zero = tl.zeros_like(like)
    return tl.where(condition, zero + a, zero + b)
