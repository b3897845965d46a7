"""Run a provider in one of the modes, and hold what it computed against an fp64 oracle."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.data import LossInputs
from benchmarks.providers import Provider, plain_logits, policy_loss


class Mode(NamedTuple):
    """What one call does; `gemms` is the number of N x V x H products that it cannot avoid."""

    gemms: int
    frozen: bool = False
    zero_advantage: float = 0.0  # share of the completions
    padding: float = 0.0  # share of the positions
    skip_zero_advantage: bool = False  # no log-probs of completions without an advantage
    policy: str | None = None  # rows of this policy of the profile; None: random rows
    support: str | None = None  # a profile of what the sampler kept; None: the whole vocabulary


MODES = {
    "logps": Mode(gemms=1),  # log-probs, no gradient
    "loss": Mode(gemms=3),  # GRPO loss, forward and backward
    "token_logps": Mode(gemms=3),  # per-token log-probs and any upstream gradient
    "frozen": Mode(gemms=2, frozen=True),  # GRPO loss, no gradient for the head
    "half_zero": Mode(gemms=3, zero_advantage=0.5),
    "half_skipped": Mode(gemms=3, zero_advantage=0.5, skip_zero_advantage=True),
    "half_masked": Mode(gemms=3, padding=0.5),
    "skip_90": Mode(gemms=3, zero_advantage=0.9),
    "rl": Mode(gemms=3, zero_advantage=0.5, padding=0.25),
    # Rows of a real model at three temperatures, of each of which a sparse backward keeps a
    # different number of entries. A few tokens are clipped.
    "policy": Mode(gemms=3, policy="temperature 1"),
    "policy_sharp": Mode(gemms=3, policy="temperature 0.6"),
    "policy_flat": Mode(gemms=3, policy="temperature 1.3"),
}
# A GRPO loss over the ids that a sampler kept: so many a token on average (benchmarks/supports.py).
# Most peers have none: a session does not go through these.
SUPPORT_MODES = {
    f"support_{name}": Mode(gemms=3, support=name) for name in ("8", "12", "76", "150")
}


class Outcome(NamedTuple):
    """What a call computed: log-probs and loss are None where the mode has none."""

    logps: Tensor | None  # (B, T)
    loss: Tensor | None  # ()
    dhidden: Tensor | None  # (B, T, H)
    dweight: Tensor | None  # (V, H)


def run(provider: Provider, mode: str, batch: LossInputs) -> Outcome:
    """Run one call from cleared gradients. Raises ValueError for a support that is not taken."""
    if batch.support is not None and not provider.takes_support:
        raise ValueError(f"support: {provider.name} has none")
    batch.hidden.grad = batch.weight.grad = None
    if mode == "logps":
        with torch.no_grad():
            return Outcome(provider.token_logps(batch), None, None, None)
    if mode == "token_logps":
        logps = provider.token_logps(batch)
        # Any upstream gradient will do. This one is at hand, and differs from token to token.
        logps.backward(batch.old_logps.to(logps.dtype) / batch.old_logps.numel())
        return Outcome(logps.detach(), None, batch.hidden.grad, batch.weight.grad)
    loss = provider.loss(batch)
    loss.backward()
    return Outcome(None, loss.detach(), batch.hidden.grad, batch.weight.grad)


def oracle(mode: str, batch: LossInputs, block: int = 256) -> Outcome:
    """Return `run` of plain logits in fp64 from the same rounded inputs, in blocks of rows."""
    exact = batch.to(torch.float64, frozen=not batch.weight.requires_grad)
    token_logps = plain_logits().token_logps
    count = batch.completion_mask.sum()
    length = batch.completion_ids.shape[1]
    loss = torch.zeros((), dtype=torch.float64, device=batch.hidden.device)
    logps = torch.zeros(batch.completion_ids.shape, dtype=torch.float64, device=loss.device)
    sequences = max(1, block // length)
    for start in range(0, batch.completion_ids.shape[0], sequences):
        rows = slice(start, start + sequences)
        part = dataclasses.replace(
            exact,
            hidden=exact.hidden[rows],
            completion_ids=exact.completion_ids[rows],
            completion_mask=exact.completion_mask[rows],
            advantages=exact.advantages[rows],
            old_logps=exact.old_logps[rows],
            support=None if exact.support is None else exact.support.select(rows),
        )
        with torch.set_grad_enabled(mode != "logps"):
            part_logps = token_logps(part)
        logps[rows] = part_logps.detach()
        if mode == "token_logps":
            part_logps.backward(part.old_logps.double() / exact.old_logps.numel())
        elif mode != "logps":
            part_loss = policy_loss(part_logps, part, normalizer=count)
            part_loss.backward()
            loss += part_loss.detach()
    return Outcome(logps, loss, exact.hidden.grad, exact.weight.grad)


class Errors(NamedTuple):
    """Distances from the oracle. A quantity that the mode does not have is None."""

    logps_rms: float | None = None  # nats
    logps_max: float | None = None  # nats
    loss: float | None = None  # absolute
    dhidden: float | None = None  # relative L2
    dweight: float | None = None  # relative L2
    dhidden_noise: float | None = None  # of an unbiased estimate: the expected error, rms
    dweight_noise: float | None = None


def errors(outcome: Outcome, exact: Outcome, mask: Tensor) -> Errors:
    def relative(value: Tensor | None, truth: Tensor | None) -> float | None:
        if value is None or truth is None:
            return None
        return ((value.double() - truth).norm() / truth.norm()).item()

    rms = largest = loss = None
    if outcome.logps is not None:
        distance = (outcome.logps.double() - exact.logps)[mask]
        rms, largest = distance.pow(2).mean().sqrt().item(), distance.abs().max().item()
    if outcome.loss is not None:
        loss = (outcome.loss.double() - exact.loss).abs().item()
    return Errors(
        rms,
        largest,
        loss,
        relative(outcome.dhidden, exact.dhidden),
        relative(outcome.dweight, exact.dweight),
    )


def sampling_noise(
    mode: str, batch: LossInputs, exact: Outcome, tau: float, block: int = 256
) -> Errors:
    """Return the root mean square, over seeds, of the sparse gradients' relative errors.

    Let tau' be tau times the factor by which the row's estimate of p is off. An entry is kept with
    probability p / tau' and then counts tau', so that its variance is p (tau' - p). Entries are
    pairwise independent, so that variances add up. The target is always kept and has none.
    """
    logps = exact.logps.float().requires_grad_()
    if mode == "token_logps":
        upstream = batch.old_logps / batch.old_logps.numel()
    else:
        (upstream,) = torch.autograd.grad(policy_loss(logps, batch), logps)
    hidden, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach().float()
    ids, taus = batch.completion_ids.flatten(), tau * (logps.detach() - batch.old_logps).exp()
    upstream, taus = upstream.flatten(), taus.flatten()
    lengths = weight.square().sum(-1)
    dhidden = dweight = 0.0
    for start in range(0, len(ids), block):
        rows = slice(start, start + block)
        h = hidden[rows].float()
        p = (h @ weight.T).softmax(-1)
        variance = (p * (taus[rows, None] - p)).clamp(min=0).scatter_(1, ids[rows, None], 0.0)
        variance *= upstream[rows, None].square()
        dhidden += (variance @ lengths).double().sum().item()
        dweight += (variance.sum(-1) * h.square().sum(-1)).double().sum().item()
    relative = [
        None if truth is None else variance**0.5 / truth.norm().item()
        for variance, truth in ((dhidden, exact.dhidden), (dweight, exact.dweight))
    ]
    return Errors(dhidden_noise=relative[0], dweight_noise=relative[1])


class Bar(NamedTuple):
    """The largest errors with which a result still counts as the same function."""

    logps_rms: float
    gradient: float


# Ours: what fastgrpo promises. Peers': what rounding the logits to 16 bits costs, with a margin.
OWN_BARS = {torch.float32: Bar(1e-5, 1e-5), torch.bfloat16: Bar(1e-5, 4e-3)}
PEER_BARS = {torch.float32: Bar(1e-4, 1e-3), torch.bfloat16: Bar(0.1, 0.1)}


NOISE_MULTIPLE = 3.0  # of an estimate's root mean square error: small cases scatter


def check(provider: Provider, found: Errors, dtype: torch.dtype) -> None:
    """Raise AssertionError, naming provider, quantity, error and bar, if `found` is too far off.

    Where gradients are an unbiased estimate, their bar is raised by a multiple of its noise.
    """
    bar = (OWN_BARS if provider.name.startswith("fastgrpo") else PEER_BARS)[dtype]
    gradients = [
        bar.gradient + NOISE_MULTIPLE * (noise or 0.0)
        for noise in (found.dhidden_noise, found.dweight_noise)
    ]
    bars = Errors(bar.logps_rms, None, bar.logps_rms, *gradients)
    for name, error, limit in zip(Errors._fields, found, bars, strict=True):
        # Written so that NaN fails.
        if error is not None and limit is not None and not error <= limit:
            raise AssertionError(
                f"{provider.name}: {name} error {error:.2e} > {limit:.0e}, {dtype}"
            )
