"""The kernels of a call: the best that have passed their check here and can be launched.

For each route there is a verdict. It is found at the first call and holds for the process:

    passed            the kernels run
    not launched      the next kernels run: anchored, then portable, then torch
    unsafe            they gave wrong numbers, or the doctor saw them hang: torch runs

With backend="triton" torch is no way out: the call raises. FASTGRPO_BACKEND takes the place of
"auto", FASTGRPO_ANCHORED=0 leaves the anchored kernels out, FASTGRPO_SELF_CHECK=0 the check.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

import fastgrpo_kernels
from fastgrpo import torch_kernels
from fastgrpo.backend import Kernels
from fastgrpo.dispatch import self_check, verdicts
from fastgrpo_kernels import Head, Rows, anchored_variant
from fastgrpo_kernels.runtime import INTERPRETED, LaunchError, capturing, obstacle, switch

BACKENDS = ("auto", "triton", "torch")
SWITCHES = ("FASTGRPO_ANCHORED", "FASTGRPO_SELF_CHECK", anchored_variant.SWITCH)
MOST_SECONDS = 120.0  # of a check; what was not looked at by then is not looked at
Result = TypeVar("Result")
log = logging.getLogger("fastgrpo")


class _Portable:
    """The Triton kernels without the anchored ones."""

    anchored_logps_fwd = linear_draw_fwd = None

    def __getattr__(self, name: str) -> object:
        return getattr(fastgrpo_kernels, name)

    @staticmethod
    def has_anchored(rows: Rows, head: Head) -> bool:
        return False


PORTABLE = cast(Kernels, _Portable())


class Route(NamedTuple):
    """What a verdict is about."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]  # of hidden and weight; empty: numbers per token, no head
    mode: str  # of `self_check.MODES`
    anchored: bool

    @property
    def kernels(self) -> Kernels:
        return fastgrpo_kernels if self.anchored else PORTABLE

    @property
    def name(self) -> str:
        """The route without its device."""
        words = [str(dtype).removeprefix("torch.") for dtype in self.dtypes] or ["tokens"]
        words += [] if self.mode == "dense" else [self.mode]
        words += ["anchored" if self.anchored else "portable"]
        return " ".join(words)

    def __str__(self) -> str:
        return f"{self.name} on {self.device}"


class Verdict(NamedTuple):
    """Whether the kernels of a route may run."""

    reason: str = ""  # why not; "" if they may
    unsafe: bool = False  # whether they ran, and not as they should


_verdicts: dict[Route, Verdict] = {}
_lock = threading.RLock()


def named(backend: str) -> str:
    """Return the backend that "auto" stands for by FASTGRPO_BACKEND; another name is itself.

    Raises ValueError for a wrong value of any variable, whether or not this call will read it.
    """
    for name in SWITCHES:
        switch(name, default=True)
    asked = os.environ.get("FASTGRPO_BACKEND", "auto") if backend == "auto" else backend
    if asked not in BACKENDS:
        raise ValueError(f"FASTGRPO_BACKEND: expected one of {list(BACKENDS)}, got {asked!r}")
    return asked


def run(
    work: Callable[[Kernels], Result],
    backend: str,
    like: Tensor,
    scored: tuple[Rows, Head] | None = None,
    mode: str = "dense",
) -> Result:
    """Return `work(kernels)` with the best kernels for tensors like this one.

    `scored` are the rows whose logits `work` needs, if any, in a mode of `self_check.MODES`. `work`
    runs again with other kernels where one cannot be launched: it must leave its inputs as they
    are.
    """
    while True:
        kernels, route = choose(backend, like, scored, mode)
        try:
            return work(kernels)
        except LaunchError as error:
            if route is None:
                raise
            _verdicts[route] = Verdict(str(error))
            _tell(route)


def choose(
    backend: str, like: Tensor, scored: tuple[Rows, Head] | None, mode: str
) -> tuple[Kernels, Route | None]:
    """Return the kernels of a call, and the route that they belong to; None for torch."""
    asked, named_by = named(backend), _named_by(backend)
    if asked == "torch":
        return torch_kernels, None
    reason = obstacle(like.device)
    if like.dtype == torch.float64:
        reason = reason or "the Triton kernels take float32, bfloat16 and float16, got float64"
    if asked == "auto" and (reason or INTERPRETED):
        return torch_kernels, None
    if reason:
        raise ValueError(f"{named_by}: {reason}")
    for route in _routes(like.device, scored, mode):
        verdict = _verdict(route)
        if not verdict.reason:
            return route.kernels, route
        if verdict.unsafe:
            break
    if asked == "auto":
        return torch_kernels, None
    raise RuntimeError(f"{named_by}, {route}: {verdict.reason}")


def _named_by(backend: str) -> str:
    """Return what asks for the Triton kernels, if anything does."""
    return "backend='triton'" if backend == "triton" else "FASTGRPO_BACKEND=triton"


def _routes(device: torch.device, scored: tuple[Rows, Head] | None, mode: str) -> Iterator[Route]:
    """Yield the routes of a call that end on Triton kernels, the best first."""
    if scored is None:
        yield Route(device, (), "dense", False)
        return
    rows, head = scored
    dtypes = (rows.hidden.dtype, head.weight.dtype)
    if switch("FASTGRPO_ANCHORED", True) and fastgrpo_kernels.has_anchored(rows, head):
        yield Route(device, dtypes, mode, True)
    yield Route(device, dtypes, mode, False)


def _verdict(route: Route) -> Verdict:
    verdict = _verdicts.get(route)
    if verdict is not None:
        return verdict
    if INTERPRETED or not switch("FASTGRPO_SELF_CHECK", True):
        return Verdict()
    if capturing(route.device):  # a stored verdict can be read, but nothing be compared
        reason = verdicts.load(verdicts.facts(route.device, route.name))
        return Verdict(reason, True) if reason else Verdict()
    with _lock:
        if route not in _verdicts:
            _verdicts[route] = _examine(route)
            if _verdicts[route].reason:
                _tell(route)
    return _verdicts[route]


def _examine(route: Route) -> Verdict:
    """Return the stored verdict on a route, or check its kernels and store the verdict."""
    facts = verdicts.facts(route.device, route.name)
    stored = verdicts.load(facts)
    if stored is not None:
        return Verdict(stored, unsafe=bool(stored))
    log.warning("fastgrpo: the first use of %s; its kernels are checked once", route)
    begun, off = time.monotonic(), []
    try:
        for figure in self_check.figures(route.kernels, route.device, route.dtypes, (route.mode,)):
            if not figure.holds:
                off.append(figure)
            if time.monotonic() - begun > MOST_SECONDS:
                log.warning("fastgrpo: no time left for the rest of the check of %s", route)
                break
        else:
            verdicts.store(facts, self_check.complaint(off))
    except LaunchError as error:
        return Verdict(str(error))
    except torch.OutOfMemoryError:
        log.warning("fastgrpo: no memory left for the check of %s", route)
        return Verdict()
    log.warning("fastgrpo: checked %s in %.1f s", route, time.monotonic() - begun)
    return Verdict(self_check.complaint(off), unsafe=bool(off))


def _tell(route: Route) -> None:
    """Warn that the kernels of a route do not run."""
    reason, unsafe = _verdicts[route]
    others = "portable kernels" if route.anchored and not unsafe else "torch backend"
    message = f"fastgrpo, {route}: {reason}. From now on backend='auto' takes the {others}."
    message += " python -m fastgrpo.doctor checks again." if unsafe else ""
    warnings.warn(message, RuntimeWarning, stacklevel=4)
