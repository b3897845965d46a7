"""TRL's chunked head: what it asks its autograd function for, and what may stand in its place.

`trl.trainer.utils.add_fused_lm_head` gives a model's forward a second form, which returns log-probs
instead of logits. It calls one autograd function, by a name in its module. Every trainer of TRL
that has such a head gets its log-probs there.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

import torch
import trl
from packaging.version import Version
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer import utils

from fastgrpo import linear_logps

VERSIONS = ((1, 15), (1, 16))
NAME = "_ChunkedLogProbFunction"
OURS = ("log_probs", "entropy")
# The backward of `DTensor.full_tensor()`.
GATHERED = "_ToTorchTensorBackward"
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class HeadCall(NamedTuple):
    """What TRL's head gives its autograd function, in order and with the function's defaults."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,) int64
    temperature: float
    chunk_size: int
    final_logit_softcapping: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hidden, weight and bias in dtypes that fastgrpo takes.

        Hidden states have autocast's dtype, or else their own, as in TRL. An fp32 weight beside
        16-bit hidden states stays as it is, so that its gradient is fp32 too.

        Raises:
            RuntimeError: for a head that is trained, and that TRL had to gather from its shards.
        """
        refuse_gathered(self.weight, self.bias)
        hidden, device = self.hidden, self.hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        kept = (hidden.dtype, torch.float32 if hidden.dtype.itemsize == 2 else hidden.dtype)
        weight, bias = (
            x if x is None or x.dtype in kept else x.to(hidden.dtype)
            for x in (self.weight, self.bias)
        )
        return hidden, weight, bias

    def transform(self) -> dict[str, float | None]:
        """Return what acts on the logits, as keyword arguments of fastgrpo's functions."""
        return {
            "temperature": self.temperature,
            "logit_scale": self.logit_scale,
            "softcap": self.final_logit_softcapping,
        }


def refuse_gathered(weight: Tensor, bias: Tensor | None) -> None:
    """Raise for a gathered head with a gradient: each rank would keep its own rows' alone."""
    if any(type(getattr(x, "grad_fn", None)).__name__ == GATHERED for x in (weight, bias)):
        raise RuntimeError(
            "lm_head: expected a head that is frozen, or that FSDP shards with the last "
            "norm or the whole model, got one that is sharded by itself: TRL gathers it, and its "
            "gradient would not be reduced over the ranks. Freeze the head, or train under DDP"
        )


class StandIn(abc.ABC):
    """What TRL's head may call instead of its autograd function."""

    @abc.abstractmethod
    def apply(self, *args: object, **kwargs: object) -> Outputs:
        """Take what the autograd function takes, and return what it returns."""


class ExactLogps(StandIn):
    """Log-probs and entropies by `linear_logps`; what else is asked for by TRL's function."""

    def __init__(self, trl_function: type[torch.autograd.Function]) -> None:
        self.trl_function = trl_function

    def apply(self, *args: object, **kwargs: object) -> Outputs:
        call = HeadCall(*args, **kwargs)
        if is_deepspeed_zero3_enabled():
            say_once("DeepSpeed ZeRO-3 shards the head in the backward: TRL's own log-probs run")
            return self.trl_function.apply(*call)
        hidden, weight, bias = call.operands()
        scored = linear_logps(
            hidden,
            weight,
            call.targets,
            bias=bias,
            entropy="differentiable" if "entropy" in call.outputs else "none",
            **call.transform(),
        )
        entropy = None if scored.entropy is None else scored.entropy.float()
        return scored.logps.float(), entropy, *self._others(call)

    def _others(self, call: HeadCall) -> tuple[Tensor | None, ...]:
        """Return what linear_logps has not. None of it has a gradient in TRL either."""
        names = tuple(name for name in call.outputs if name not in OURS)
        if not names:
            return None, None, None
        say_once(
            f"outputs: {', '.join(names)} come from TRL's own function, at the price of one more "
            "product with the head; log-probs and entropies are fastgrpo's"
        )
        return self.trl_function.apply(*call._replace(outputs=names))[2:]


@contextlib.contextmanager
def standing_in(stand_in: StandIn) -> Iterator[None]:
    """Within this context TRL's head calls `stand_in`."""
    found = getattr(utils, NAME)
    setattr(utils, NAME, stand_in)
    try:
        yield
    finally:
        setattr(utils, NAME, found)


class Patch(contextlib.AbstractContextManager):
    """What `patch` returns: leaving it as a context puts back what `patch` found."""

    def __init__(self) -> None:
        self._found: object = None

    def __enter__(self) -> Patch:
        if self._found is None:
            found = getattr(utils, NAME, None)
            if not isinstance(found, StandIn):
                setattr(utils, NAME, ExactLogps(checked(found)))
            self._found = found
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        setattr(utils, NAME, self._found)
        self._found = None


def patch() -> Patch:
    """Put `fastgrpo.linear_logps` under every trainer of TRL that has a chunked head.

    A call lasts for the process; as a context, `with patch():`, until it is left. Log-probs and
    entropies then come from fp32 logits that are never rounded. Trainers, losses and metrics are
    TRL's. A second call changes nothing, and contexts may be nested.

    Two things are TRL's own still, and said once in a warning: outputs other than log-probs and
    entropies, and everything under DeepSpeed ZeRO-3.

    Raises:
        RuntimeError: for a version of TRL other than 1.15 and 1.16, and where the function that
            would be replaced takes other arguments. A head that is trained, and that FSDP2 shards
            as a unit of its own, raises at the first log-probs.
    """
    return Patch().__enter__()


def checked(found: object) -> type[torch.autograd.Function]:
    """Return TRL's autograd function if it is the one that is known here; raise otherwise."""
    if Version(trl.__version__).release[:2] not in VERSIONS:
        raise RuntimeError(f"trl: expected a version >= 1.15 and < 1.17, got {trl.__version__}")
    defaults = HeadCall._field_defaults
    wanted = {name: defaults.get(name, inspect.Parameter.empty) for name in HeadCall._fields}
    wanted = {"ctx": inspect.Parameter.empty, **wanted}
    given = inspect.signature(found.forward).parameters if hasattr(found, "forward") else {}
    given = {name: parameter.default for name, parameter in given.items()}
    if list(given.items()) != list(wanted.items()):
        raise RuntimeError(
            f"trl.trainer.utils.{NAME}: expected an autograd function of {_listed(wanted)}, "
            f"got {_listed(given) or found!r}"
        )
    return found


@functools.cache
def say_once(message: str) -> None:
    """Warn of what runs instead, once for each process."""
    warnings.warn(f"fastgrpo.integrations.trl: {message}", UserWarning, stacklevel=3)


def _listed(parameters: dict[str, object]) -> str:
    names = (
        name if default is inspect.Parameter.empty else f"{name}={default!r}"
        for name, default in parameters.items()
    )
    return ", ".join(names)
