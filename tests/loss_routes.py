"""Every route that a call can take, behind one interface: shared by the tests of tests/faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastgrpo
from fastgrpo import LossConfig
from fastgrpo.testing import Batch, relative_error
from fastgrpo_kernels.runtime import INTERPRETED
from oracle import GRADIENT_BARS
from support_oracle import kept_masks, support_of

RANK = 3


class Outcome(NamedTuple):
    value: Tensor  # (), what was differentiated
    logps: Tensor  # as completion_ids
    dhidden: Tensor  # as hidden
    dweight: Tensor  # of the weight or the adapter's B; dhidden again where both are frozen


class Route(NamedTuple):
    function: Callable
    options: Callable[[Batch], dict] = lambda batch: {}
    dtype: torch.dtype | None = None  # of hidden and weight; None: as they are
    frozen: bool = False  # whether the weight has no gradient, and no adapter either


def two_rows(batch: Batch) -> dict:
    """A workspace for two rows of logits, or one in float64: several chunks, the last ragged."""
    return {"workspace_mb": 2.5 * 4 * len(batch.weight) / 2**20}


def support(batch: Batch) -> dict:
    vocab, device = len(batch.weight), batch.weight.device
    ids = batch.completion_ids.clamp(0, vocab - 1).cpu()
    return {"support": support_of(kept_masks(ids, vocab), ids).to(device)}


def adapter(batch: Batch) -> dict:
    """Of a smaller vocabulary, the first rows of it."""
    vocab, hidden_size = batch.weight.shape
    sizes = ((RANK, hidden_size), (vocab, RANK))
    factors = (0.2 * torch.arange(r * c).sin().view(r, c) for r, c in sizes)
    return {"lora": tuple(x.to(batch.weight) for x in factors)}


def loss(**fields) -> Callable[[Batch], dict]:
    return lambda batch: {"config": LossConfig(**fields)}


def always(**options) -> Callable[[Batch], dict]:
    return lambda batch: options


ROUTES = {
    "loss": Route(fastgrpo.grpo_loss),
    "loss, several chunks": Route(fastgrpo.grpo_loss, two_rows),
    "loss of two phases": Route(fastgrpo.grpo_loss, always(config="gspo")),
    "loss with a frozen head": Route(fastgrpo.grpo_loss, frozen=True),
    "loss of two phases with a frozen head": Route(
        fastgrpo.grpo_loss, always(config="gspo"), frozen=True
    ),
    "loss in fp16": Route(fastgrpo.grpo_loss, dtype=torch.float16),
    "loss with an entropy bonus": Route(fastgrpo.grpo_loss, loss(entropy_coef=0.1)),
    "loss, differentiable entropy": Route(
        fastgrpo.grpo_loss, loss(entropy="differentiable", entropy_coef=0.1)
    ),
    "loss without zero advantages": Route(fastgrpo.grpo_loss, always(skip_zero_advantage=True)),
    "loss, sparse": Route(fastgrpo.grpo_loss, always(sparsity=0.01, seed=1)),
    "loss over a support": Route(fastgrpo.grpo_loss, support),
    "loss with an adapter": Route(fastgrpo.grpo_loss, adapter),
    "log-probs": Route(fastgrpo.linear_logps),
    "log-probs, several chunks": Route(fastgrpo.linear_logps, two_rows),
    "log-probs with a frozen head": Route(fastgrpo.linear_logps, frozen=True),
    "log-probs in fp16": Route(fastgrpo.linear_logps, dtype=torch.float16),
    "log-probs, sparse": Route(fastgrpo.linear_logps, always(sparsity=0.01, seed=1)),
    "log-probs over a support": Route(fastgrpo.linear_logps, support),
    "log-probs with an adapter": Route(fastgrpo.linear_logps, adapter),
    "selected log-probs": Route(fastgrpo.selected_logps),
}
LOSSES = [name for name, route in ROUTES.items() if route.function is fastgrpo.grpo_loss]
LOG_PROBS = [name for name in ROUTES if name not in LOSSES]
# The public functions of a hidden state, a head and a batch.
FUNCTIONS = {
    "grpo_loss": lambda h, w, b, **o: fastgrpo.grpo_loss(h, w, *b[2:5], **o).loss,
    "linear_logps": lambda h, w, b, **o: fastgrpo.linear_logps(h, w, b[2], **o).logps,
    "selected_logps": lambda h, w, b, **o: (
        fastgrpo.selected_logps(h, w, b[2][..., None], **o).logps
    ),
}
# The interpreter takes a tenth of a second for a call: one of each family of kernels.
INTERPRETED_FIRST = ("loss in fp16", "loss over a support", "log-probs")


def routes(*, without: tuple[str, ...] = (), of=tuple(ROUTES)) -> pytest.MarkDecorator:
    """Parametrize `route`; in the interpreter most routes are slow ones."""
    return pytest.mark.parametrize("route", [
        pytest.param(
            name, marks=pytest.mark.slow if INTERPRETED and name not in INTERPRETED_FIRST else ()
        )
        for name in of if not any(word in name for word in without)
    ])  # fmt: skip


def log_probs(name: str, batch: Batch, **given) -> Tensor:
    """Return the log-probs of a route that is no loss, differentiable and as completion_ids."""
    function, options = ROUTES[name][:2]
    ids = batch.completion_ids.masked_fill(~batch.completion_mask, -100)
    if function is fastgrpo.selected_logps:
        ids = torch.stack([ids, ids], -1)
    logps = function(batch.hidden, batch.weight, ids, **options(batch) | given).logps
    return logps[..., 0] if function is fastgrpo.selected_logps else logps


def call(name: str, batch: Batch, **given) -> tuple[Tensor, Tensor]:
    """Return a number to differentiate, and the log-probs.

    The number is the loss. Of log-probs it is their sum over the tokens, times their advantages.
    """
    function, options = ROUTES[name][:2]
    if function is fastgrpo.grpo_loss:
        out = function(*batch[:5], old_logps=batch.old_logps, **options(batch) | given)
        return out.loss, out.logps
    logps, mask = log_probs(name, batch, **given), batch.completion_mask
    per_token = batch.advantages
    per_token = per_token[:, None].expand_as(mask) if per_token.dim() == 1 else per_token
    return torch.where(mask, logps * per_token, 0.0).sum(), logps.detach()


def leaves(name: str, batch: Batch) -> tuple[Batch, dict, Tensor]:
    """Return the batch with what it differentiates, options of the call, and the second leaf."""
    dtype = ROUTES[name].dtype
    hidden, weight = (x.detach() if dtype is None else x.detach().to(dtype) for x in batch[:2])
    batch = batch._replace(hidden=hidden.requires_grad_(), weight=weight)
    options = ROUTES[name].options(batch)
    if "lora" in options:
        a, b = options["lora"]
        return batch, {"lora": (a, b.requires_grad_())}, b
    if ROUTES[name].frozen:
        return batch, {}, batch.hidden
    return batch, {}, weight.requires_grad_()


def run(name: str, batch: Batch, upstream: float = 1.0, **given) -> Outcome:
    """Return what a route makes of a batch, and its gradients times `upstream`."""
    batch, options, trained = leaves(name, batch)
    value, logps = call(name, batch, **options, **given)
    (value * upstream).backward()
    return Outcome(value.detach(), logps, batch.hidden.grad, trained.grad)


def exact(name: str, batch: Batch, **given) -> Outcome:
    """Return what the torch backend makes of a batch in float64, of the route's own inputs."""
    dtype = ROUTES[name].dtype or batch.hidden.dtype
    wide = Batch(
        *(x.to(dtype if field in ("hidden", "weight") else x.dtype).double()
          if x.is_floating_point() else x for field, x in batch._asdict().items())
    )  # fmt: skip
    exactly = {"loss in fp16": "loss", "log-probs in fp16": "log-probs"}.get(name, name)
    given = {k: v.double() if torch.is_tensor(v) else v for k, v in given.items()}
    return run(exactly, wide, backend="torch", **given)


def assert_same(actual: Outcome, wanted: Outcome) -> None:
    """Within what rounding leaves: 2e-5 nats, and relative errors of gradients as in `oracle`."""
    for x, y in zip(actual[:2], wanted[:2], strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-5, atol=2e-5)
    for name, x, y in zip(("dhidden", "dweight"), actual[2:], wanted[2:], strict=True):
        assert relative_error(x, y) <= GRADIENT_BARS.get(x.dtype, 1e-5), name
