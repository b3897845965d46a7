"""Rows as the kernels beyond the scores take them, and what must come out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fastgrpo_kernels
from fastgrpo import LossConfig, reference
from fastgrpo.head import loops
from fastgrpo.head.plan import Head, Needs, Plan, Rows, Upstream
from fastgrpo.testing import make_batch, relative_error, rms
from fastgrpo_kernels.surrogates import SURROGATES

# ---- the loss of a token -----------------------------------------------------------------------

LOW, HIGH = 0.2, 0.28
N = 300  # two whole blocks of the interpreter's launch and a ragged one


def parameters(name):
    rule = SURROGATES[name]
    bounds = {"epsilon_low": LOW, "epsilon_high": HIGH, "delta": 3.0, "proximal_coef": 0.3}
    bounds["epsilon_high"] = 3.0 if name == "cispo_raw" else HIGH
    given = {key: value for key, value in bounds.items() if key in rule.parameters}
    return LossConfig(surrogate=name, ratio_level=rule.ratio_levels[0], **given).parameters


def loss_rows():
    """Rows at, around and far from every clip edge, with both signs of advantage and 0."""
    g = torch.Generator().manual_seed(0)
    edges = torch.tensor([1 - LOW, 1 + HIGH, 1.1, 3.0, 1.0]).log()
    log_ratio = torch.cat([edges, edges + 1e-4, edges - 1e-4, edges + 0.1, edges - 0.1])
    log_ratio = torch.cat([log_ratio.repeat(10), torch.randn(N - 250, generator=g)])
    logps = -3 * torch.rand(N, generator=g) - 1.2
    advantages = torch.randn(N, generator=g)
    advantages[::11] = 0.0
    weights, multipliers = torch.rand(N, generator=g) / N, 2 * torch.rand(N, generator=g)
    multipliers[::7] = 0.0
    context = torch.rand(N, generator=g).round()
    ref_logps = logps + 0.5 * torch.randn(N, generator=g)
    return logps, log_ratio, advantages, weights, multipliers, context, ref_logps


# ---- kept entries ------------------------------------------------------------------------------

ENTRY_OPTIONS = {
    "plain": {},
    "temperature": {"inv_temperature": True},
    "everything": {"inv_temperature": True, "bias": True, "logit_scale": 1.3, "softcap": 9.0},
}


def entry_operands(n=13, vocab=1100, slots=24, hidden_size=72, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    z = 2 * normal(n, vocab)
    ids = torch.randint(vocab, (n,), generator=g)
    words = [torch.randint(2**23, (k,), generator=g, dtype=torch.int32) for k in (vocab, n)]
    return z, ids, words, normal(n).abs() + 0.5, normal(vocab), normal(n, hidden_size)


def options_of(name, inv_temperature, bias):
    chosen = dict(ENTRY_OPTIONS[name])
    return (
        bias if chosen.get("bias") else None,
        inv_temperature if chosen.get("inv_temperature") else None,
        chosen.get("logit_scale", 1.0),
        chosen.get("softcap", 0.0),
    )


# ---- gradients from exponentials ---------------------------------------------------------------

NEEDS = {"trainable": Needs(True, True, True), "frozen": Needs(True, False, False)}
TRANSFORMED = {"plain": False, "bias, temperature, scale and softcap": True}
CHUNKING = {"one chunk, all alive": (512, 0.0), "several chunks, half dead": (100, 0.5)}


class Given(NamedTuple):
    """Rows with dL/dlogp, and what must come out, fp64."""

    rows: Rows
    head: Head
    upstream: Tensor  # (n,)
    logps: Tensor  # (n,)
    lse: Tensor  # (n,)
    grads: tuple[Tensor, Tensor, Tensor]


def rows_with_upstream(logit_std, options, dead, device="cpu", **shape) -> Given:
    batch = make_batch(dtype=torch.bfloat16, logit_std=logit_std, **shape)
    g = torch.Generator().manual_seed(1)
    hidden, ids = (x[batch.completion_mask] for x in (batch.hidden, batch.completion_ids))
    n, vocab = len(ids), len(batch.weight)
    bias = torch.randn(vocab, generator=g).bfloat16() if options else None
    inv_temperature = torch.linspace(0.7, 1.4, n) if options else None
    scale, softcap = (0.7, 9.0) if options else (1.0, 0.0)
    upstream = torch.randn(n, generator=g) * (torch.rand(n, generator=g) >= dead) / n
    leaves = [x.double().requires_grad_() for x in (hidden, batch.weight, torch.zeros(vocab))]
    logps, _, lse = reference.token_logps(
        *leaves[:2], ids, bias=leaves[2] + (bias.double() if options else 0.0),
        temperature=inv_temperature.double().reciprocal() if options else 1.0,
        logit_scale=scale, softcap=softcap or None,
    )  # fmt: skip
    grads = torch.autograd.grad((logps * upstream).sum(), leaves)
    bias, inv_temperature = (None if x is None else x.to(device) for x in (bias, inv_temperature))
    return Given(
        Rows(hidden.to(device), ids.to(device), inv_temperature),
        Head(batch.weight.to(device), bias, scale, softcap),
        upstream.to(device), logps.detach(), lse.detach(), grads,
    )  # fmt: skip


def check_gradients_from_exponentials(given: Given, plan: Plan, needs: Needs) -> None:
    """One pass, dL/dlogp given: every gradient is a GEMM of exponentials and a factor per row."""
    scored, grads = loops.logps_and_grads(
        fastgrpo_kernels, given.rows, given.head, plan, True,
        lambda c, _: Upstream(given.upstream[c], None), needs,
        entropy_gradient=False, may_drop_rows=True,
    )  # fmt: skip
    for actual, exact_scores in zip(scored, (given.logps, given.lse), strict=False):
        assert rms(actual.cpu(), exact_scores) <= 1e-5
    assert scored.entropy.shape == given.logps.shape
    # Both operands of the GEMM for the weight are rounded, the exponentials and the scaled rows:
    # sqrt(3) times the rounding of the result, where one entry makes up a row.
    for actual, exact_grad, bar in zip(grads, given.grads, (1.25, 1.4, 1.25), strict=True):
        if actual is not None:
            rounding = relative_error(exact_grad.bfloat16(), exact_grad)
            assert relative_error(actual.bfloat16().cpu(), exact_grad) <= bar * rounding
    assert [x is not None for x in grads] == list(needs)
