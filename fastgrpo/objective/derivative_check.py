"""Whether a surrogate is its formula and its slope the derivative: what registration insists on.

float64 on the CPU, at every ratio level, at log-ratios from 0 to 2.6 of either sign and at
advantages of either sign and 0. With the parameters' defaults, and with all of them moved, so that
a term whose coefficient is 0 by default is seen as well.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastgrpo_kernels.surrogates import Surrogate
from fastgrpo_kernels.twins import torch_twin

# Bounds are round numbers, and these are not: a kink has no derivative to compare.
_STEPS = [1.0372 * 10 ** (-k / 2.5) for k in range(-1, 11)]
_LOG_RATIOS = [0.0, *_STEPS, *(-step for step in _STEPS)]
_LOGPS = [-0.0213, -0.713, -4.19]
_ADVANTAGES = [1.37, -0.83, 0.0]
_CONTEXTS = [0.0, 1.0, 0.91, -0.37]
# What torch rounds to fp32, a number in `tl.where` say, is not a wrong derivative.
_RTOL, _ATOL = 1e-6, 1e-9


def check_derivative(surrogate: Surrogate) -> None:
    """Raise ValueError that names the input where value, slope, side or inertness are wrong."""
    moved = {name: 1.1 * value or 0.1 for name, value in surrogate.own.items()}
    # Nothing of the caller's may keep the formula from being differentiated.
    with torch.inference_mode(False), torch.enable_grad():
        for level in surrogate.ratio_levels:
            _Comparison(surrogate, level, dict(surrogate.own)).check(everywhere=True)
            # Beyond its defaults a parameter may be out of its range.
            _Comparison(surrogate, level, moved).check(everywhere=False)


class _Comparison:
    """A surrogate at one ratio level, on a grid of tokens, (n,) each."""

    def __init__(self, surrogate: Surrogate, level: str, parameters: dict[str, float]) -> None:
        self.surrogate, self.level, self.parameters = surrogate, level, parameters
        grid = itertools.product(
            _LOGPS,
            [0.0] if level == "none" else _LOG_RATIOS,
            _ADVANTAGES,
            _CONTEXTS if surrogate.context else [0.0],
        )
        columns = zip(*grid, strict=True)
        self.tokens = [torch.tensor(x, dtype=torch.float64, device="cpu") for x in columns]

    def check(self, everywhere: bool) -> None:
        value, gradients = self._differentiate()
        finite = value.isfinite() & gradients["logp"].isfinite() & gradients["ratio"].isfinite()
        if everywhere:
            self._require(finite, "formula: expected a finite loss and gradient", value)
        named = {"ratio": "log_ratio", "logp": "logp"}
        moving = named.pop(self.surrogate.slope)
        (still,) = named
        self._require(
            ~finite | (gradients[still] == 0),
            f"formula: expected all of its gradient with respect to {moving}, as "
            f"slope={self.surrogate.slope!r} says, and none with respect to {named[still]}",
            gradients[still],
        )
        slope = gradients[self.surrogate.slope]
        actual_value, actual_slope, side = self._run()
        for name, actual, wanted in (
            ("the loss", actual_value, value),
            (f"the slope dL/d{moving}", actual_slope, slope),
        ):
            close = torch.isclose(actual.to(wanted.dtype), wanted, rtol=_RTOL, atol=_ATOL)
            self._require(
                ~finite | close, f"fn: expected {name} {{}} of the formula", actual, wanted
            )
        sides = (side == -1) | (side == 0) | (side == 1)
        self._require(sides, "fn: expected clipped to be -1, 0 or 1", side)
        if self.surrogate.inert:
            idle = (self.tokens[2] != 0) | ~finite
            message = "inert: expected False for a loss with {} at advantage 0"
            self._require(idle | (actual_slope == 0), message.format("a gradient"), actual_slope)
            self._require(idle | (actual_value == 0), message.format("a value"), actual_value)

    def _differentiate(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the formula's loss and its gradients with respect to logp and log_ratio."""
        logp, log_ratio, *constants = self.tokens
        logp, log_ratio = logp.clone().requires_grad_(), log_ratio.clone().requires_grad_()
        try:
            value = self.surrogate.formula(logp, log_ratio, *constants, *self.parameters.values())
        except Exception as error:
            raise ValueError(
                f"formula: expected a loss of tensors, got {type(error).__name__}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.shape != logp.shape:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"formula: expected a tensor, one loss per token, got {came}")
        if not value.requires_grad:
            raise ValueError("formula: expected a loss with a gradient, got one that is detached")
        # At the level "none" there is no ratio that could move.
        moving = (logp,) if self.level == "none" else (logp, log_ratio)
        gradients = torch.autograd.grad(
            value.sum(), moving, allow_unused=True, materialize_grads=True
        )
        by_ratio = gradients[1] if len(gradients) == 2 else torch.zeros_like(logp)
        return value.detach(), {"logp": gradients[0], "ratio": by_ratio}

    def _run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what fn computes on tensors: loss, slope and clipped."""
        tokens = [x.clone() for x in self.tokens]
        try:
            # Triton looks at what fn refers to as soon as it is hashed here.
            results = torch_twin(self.surrogate.fn)(*tokens, *self.parameters.values())
        except Exception as error:
            raise ValueError(
                "fn: expected arithmetic, functions of tl that torch has too, and functions under "
                f"fastgrpo_kernels.runtime.jit, got {type(error).__name__}: {error}"
            ) from error
        if not all(torch.equal(x, y) for x, y in zip(tokens, self.tokens, strict=True)):
            raise ValueError(
                "fn: expected arguments left as they are, got one that is assigned to in place: "
                "write x = x * y for x *= y"
            )
        results = results if isinstance(results, tuple) else (results,)
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else repr(x) for x in results]
        n = len(self.tokens[0])
        if shapes != [(n,)] * 3:
            raise ValueError(
                "fn: expected tensors (loss, slope, clipped), a number per token each (advantage * "
                f"0.0 where nothing is clipped), got {shapes} for {n} tokens"
            )
        return results

    def _require(
        self, holds: Tensor, expected: str, actual: Tensor, wanted: Tensor | None = None
    ) -> None:
        """Raise ValueError at the first token where something does not hold."""
        wrong = (~holds).nonzero()
        if not len(wrong):
            return
        i = wrong[0].item()
        names = ("logp", "log_ratio", "advantage", "context")
        inputs = {name: x[i].item() for name, x in zip(names, self.tokens, strict=True)}
        where = ", ".join(f"{n}={x:.6g}" for n, x in {**inputs, **self.parameters}.items())
        if wanted is not None:
            expected = expected.format(f"{wanted[i].item():.9g}")
        raise ValueError(
            f"{expected}; got {actual[i].item():.9g} at {where}, ratio_level={self.level!r}"
        )
