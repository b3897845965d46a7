"""What an op is: a flat list of tensors and numbers, without autocast and second derivatives."""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastgrpo.head.gradients import Grads

WAITS = (torch.Tag.cudagraph_unsafe,)  # the host counts rows: no compiled graph holds these ops


def without_autocast(fn: Callable) -> Callable:
    """Disable autocast in an op: it would round fp32 operands to 16 bits."""

    @functools.wraps(fn)
    def wrapped(first: Tensor, *args, **kwargs):
        with torch.autocast(first.device.type, enabled=False):
            return fn(first, *args, **kwargs)

    return wrapped


def parameters(fn: Callable) -> type:
    """Return a named tuple with a field for each parameter of an op, None by default."""
    names = list(inspect.signature(fn).parameters)
    return namedtuple("Parameters", names, defaults=[None] * len(names))


def in_dtypes(grads: Grads, dtypes: Iterable[torch.dtype | None]) -> Iterable[Tensor | None]:
    """Yield the gradients converted to these dtypes."""
    return (None if g is None else g.to(d) for g, d in zip(grads, dtypes, strict=True))


def or_empty(results: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Replace None by an empty tensor: an op can return only tensors."""
    return tuple(like.new_empty(0) if x is None else x for x in results)


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("fastgrpo ops have no second derivative: create_graph must be False")


def spoiled(dlogps: Tensor, logps: Tensor) -> Tensor:
    """Return NaN as the gradient of a NaN log-prob, unless the caller leaves that log-prob out.

    Of an id that is not there the softmax alone would have a gradient, and a finite one.
    """
    return dlogps.masked_fill(logps.isnan() & (dlogps != 0), torch.nan)
