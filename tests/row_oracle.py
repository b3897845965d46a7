"""Inputs of the kernels that take scored rows, and the expected results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import LossConfig, reference
from fastgrpo.head import loops
from fastgrpo.head.plan import Needs, Plan
from fastgrpo.testing import make_batch, relative_error, rms
from fastgrpo_kernels import Head, Rows, TokenObjective, Tokens, Upstream
from fastgrpo_kernels.surrogates import SURROGATES

# ---- the loss of a token -----------------------------------------------------------------------

LOW, HIGH = 0.2, 0.28
EDGES = torch.tensor([1 - LOW, 1 + HIGH, 1.1, 3.0, 1.0])  # of ratios
N = 300  # two whole blocks of the interpreter's launch and a ragged one


def loss_of(name, **options):
    """The loss of a token with this surrogate."""
    return TokenObjective(name, parameters(name), **options)


def parameters(name):
    rule = SURROGATES[name]
    bounds = {"epsilon_low": LOW, "epsilon_high": HIGH, "delta": 3.0, "proximal_coef": 0.3}
    bounds["epsilon_high"] = 3.0 if name == "cispo_raw" else HIGH
    given = {key: value for key, value in bounds.items() if key in rule.parameters}
    return LossConfig(surrogate=name, ratio_level=rule.ratio_levels[0], **given).parameters


def loss_tokens() -> Tokens:
    """Tokens at, around and far from every clip edge, with both signs of advantage and 0."""
    g = torch.Generator().manual_seed(0)
    edges = EDGES.log()
    log_ratio = torch.cat([edges, edges + 1e-4, edges - 1e-4, edges + 0.1, edges - 0.1])
    log_ratio = torch.cat([log_ratio.repeat(10), torch.randn(N - 250, generator=g)])
    logps = -3 * torch.rand(N, generator=g) - 1.2
    advantages = torch.randn(N, generator=g)
    advantages[::11] = 0.0
    weights, multipliers = torch.rand(N, generator=g) / N, 2 * torch.rand(N, generator=g)
    multipliers[::7] = 0.0
    context = torch.rand(N, generator=g).round()
    ref_logps = logps + 0.5 * torch.randn(N, generator=g)
    return Tokens(logps, log_ratio, advantages, weights, multipliers, context, ref_logps)


def off_the_edges(tokens: Tokens) -> Tokens:
    """Return the tokens whose ratio is not on an edge, but for 1, which no loss bounds."""
    clear = (tokens.log_ratio[:, None] != EDGES[EDGES != 1].log()).all(1)
    assert 0.7 * N < clear.sum() < N
    return Tokens(*(x[clear] for x in tokens))


# ---- kept entries ------------------------------------------------------------------------------

ENTRY_OPTIONS = {
    "plain": {},
    "temperature": {"inv_temperature": True},
    "everything": {"inv_temperature": True, "bias": True, "logit_scale": 1.3, "softcap": 9.0},
}


def entry_operands(name, dtype=torch.float32, n=13, vocab=1100, hidden_size=72):
    """Rows, a head with these options, other raw logits (n, V), and random words."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    z = 2 * normal(n, vocab)
    ids = torch.randint(vocab, (n,), generator=g)
    words = [torch.randint(2**23, (k,), generator=g, dtype=torch.int32) for k in (vocab, n)]
    inv_temperature, bias = normal(n).abs() + 0.5, normal(vocab)
    weight, chosen = normal(vocab, hidden_size), dict(ENTRY_OPTIONS[name])
    rows = Rows(
        normal(n, hidden_size).to(dtype), ids,
        inv_temperature if chosen.pop("inv_temperature", False) else None,
    )  # fmt: skip
    bias = bias.to(dtype) if chosen.pop("bias", False) else None
    return rows, Head(weight.to(dtype), bias, **chosen), z, words


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


class Linear(NamedTuple):
    """A loss with given gradients."""

    dlogps: Tensor  # (n,)
    entropy_gradient: bool = False
    with_entropy: bool = True
    may_drop_rows: bool = True
    magnitude: Tensor | None = None

    def upstream(self, chunk, scored):
        return Upstream(self.dlogps[chunk])


def check_gradients_from_exponentials(given: Given, plan: Plan, needs: Needs) -> None:
    """One pass, dL/dlogp given: every gradient is a GEMM of exponentials and a factor per row."""
    loss = Linear(given.upstream)
    scored, grads = loops.logps_and_grads(given.rows, given.head, plan, needs, loss)
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
