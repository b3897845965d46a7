"""Rows 19, 23, 25, 34 to 40 of the fault matrix: what autograd and torch.compile do with a loss."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastgrpo
from fastgrpo import LossConfig, ops
from fastgrpo.objective.presets import PRESETS
from fastgrpo.testing import Batch, make_batch, relative_error
from loss_routes import FUNCTIONS, ROUTES, assert_same, call, exact, leaves, routes, run
from oracle import GRADIENT_BARS, largest_inside

SMALL = dict(sequences=3, length=4, hidden_size=16)


@pytest.mark.parametrize("preset", PRESETS)
def test_row_19_ratios_beyond_fp32(preset):
    """From e^-1000 to e^1000: whatever the sign of the advantage, nothing is NaN."""
    batch = make_batch(**SMALL)
    config = LossConfig.preset(
        preset, **{"max_completion_length": 4} if preset == "dr_grpo" else {}
    )
    for scale, before in ((1.0, -100.0), (1.0, -1000.0), (100.0, -0.1), (1000.0, -0.1)):
        logps = fastgrpo.linear_logps(*batch[:3], logit_scale=scale).logps
        old = logps + before if scale == 1 else torch.full_like(logps, before)
        for advantages in (torch.tensor([1.0, -1.0, 0.0]), torch.zeros(3)):
            for beta in {config.beta, config.beta or 0.1}:
                hidden, weight = (x.detach().clone().requires_grad_() for x in batch[:2])
                out = fastgrpo.grpo_loss(
                    hidden, weight, *batch[2:4], advantages, logit_scale=scale,
                    old_logps=old, ref_logps=old, sampler_logps=old,
                    config=dataclasses.replace(config, beta=beta),
                )  # fmt: skip
                grads = torch.autograd.grad(out.loss, (hidden, weight))
                assert not out.loss.isnan() and not any(x.isnan().any() for x in grads)


@routes(of=("loss, several chunks", "loss of two phases", "log-probs, several chunks"))
def test_row_23_sums_over_chunks_are_fp32(route):
    """Hundreds of equal terms: a sum in bf16 stops growing at 256 of them."""
    batch = make_batch(sequences=1, length=1, hidden_size=8, vocab=23)
    n = 600
    many = Batch(
        *(x if name in ("weight", "advantages") else x.expand(1, n, *x.shape[2:])
          for name, x in batch._asdict().items())
    )  # fmt: skip
    many = many._replace(hidden=many.hidden.bfloat16(), weight=many.weight.bfloat16())
    assert_same(run(route, many), exact(route, many))


@pytest.mark.parametrize(
    "needs",
    [(True, False, False), (False, True, False), (False, False, True), (False, False, False)],
    ids=str,
)
@routes(without=("adapter", "fp16", "frozen"))
def test_row_25_what_is_frozen_has_no_gradient(route, needs):
    """And what is not has the gradient that it has beside the others."""
    batch = make_batch(**SMALL)
    bias = torch.linspace(-1, 1, len(batch.weight))

    def grads(needs):
        leaf = [x.detach().clone().requires_grad_(n) for x, n in zip(
            (batch.hidden, batch.weight, bias), needs, strict=True
        )]  # fmt: skip
        given = batch._replace(hidden=leaf[0], weight=leaf[1])
        value, _ = call(route, given, bias=leaf[2])
        assert value.requires_grad == any(needs)
        if any(needs):
            value.backward()
        return [x.grad for x in leaf]

    for wanted, actual, needed in zip(grads([True] * 3), grads(needs), needs, strict=True):
        assert (actual is not None) == needed
        assert actual is None or relative_error(actual, wanted) <= 1e-5


# ---- torch.compile -----------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_row_34_one_graph_for_every_shape(function):
    """Whole, equal to the eager call, and compiled twice more at most over six shapes."""
    counter, run_one = CompileCounterWithBackend("aot_eager"), FUNCTIONS[function]

    def step(hidden, weight, batch):
        return run_one(hidden.tanh(), weight, batch, temperature=0.8).sum() * 2

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for sequences, length in ((3, 4), (2, 5), (4, 4), (5, 7), (2, 2), (6, 3)):
        batch = make_batch(sequences=sequences, length=length, hidden_size=16)
        operands = [x.requires_grad_() for x in batch[:2]]
        results = [torch.autograd.grad(f(*operands, batch), operands) for f in (step, compiled)]
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
    assert 1 <= counter.frame_count <= 3


COMPILED = {
    "skip_zero_advantage": lambda b: {"skip_zero_advantage": True, "config": "dapo"},
    "a correction": lambda b: {
        "config": LossConfig(correction="sequence_mis", rejection="seq_mean_k3", rejection_max=2.0),
        "sampler_logps": b.sampler_logps,
    },
    "no tokens far off": lambda b: {"config": LossConfig(off_policy_mask_threshold=0.1)},
    "a quantile of entropies": lambda b: {"config": LossConfig(top_entropy_quantile=0.5)},
    "a threshold of entropies": lambda b: {
        "config": LossConfig(top_entropy_quantile=0.5), "entropy_threshold": 0.3,
    },
    "prompts": lambda b: {
        "config": LossConfig(aggregation="prompt_mean"), "group_ids_or_size": 3,
    },
    "prompts by id": lambda b: {
        "config": LossConfig(aggregation="prompt_mean"),
        "group_ids_or_size": torch.tensor([4, 2, 4]),
    },
    "a normalizer": lambda b: {"config": "dr_grpo", "normalizer": torch.tensor(7.0)},
    "a draw": lambda b: {"config": LossConfig(surrogate="clip_cov"), "seed": 3},
    "sparse": lambda b: {"sparsity": 0.01, "seed": 3},
    "a support": ROUTES["loss over a support"].options,
    "an adapter and a temperature for each token": lambda b: {
        **ROUTES["loss with an adapter"].options(b), "temperature": 1.5 + b.old_logps.sigmoid(),
    },
}  # fmt: skip


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_row_34_every_option_is_compiled_whole(options):
    batch = make_batch(**SMALL)
    given = options(batch)
    trained = "lora" not in given
    torch.compiler.reset()  # the same function, compiled for another call, counts as a recompile

    def step(hidden, weight):
        return fastgrpo.grpo_loss(
            hidden.tanh(), weight, *batch[2:5], old_logps=batch.old_logps, **given
        ).loss * 2  # fmt: skip

    compiled, results = torch.compile(step, fullgraph=True, backend="aot_eager"), []
    for function in (compiled, step):
        leaves = [batch.hidden.clone().requires_grad_()]
        weight = batch.weight.clone().requires_grad_(trained)
        leaves += [weight] if trained else []
        loss = function(leaves[0], weight)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for traced, eager in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


# ---- several backwards, none, and scaled ones --------------------------------------------------


@routes()
def test_row_35_two_backwards_and_nothing_is_changed(route):
    batch, options, trained = leaves(route, make_batch(**SMALL))
    before = Batch(*(x.detach().clone() for x in batch))
    value, logps = call(route, batch, **options)
    results = [value.item(), logps.clone()]
    first = torch.autograd.grad(value, (batch.hidden, trained), retain_graph=True)
    again = torch.autograd.grad(value, (batch.hidden, trained))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(batch[:7], before, strict=False))
    assert results[0] == value.item() and torch.equal(results[1], logps)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


WIDE = dict(sequences=4, length=128, vocab=4096, hidden_size=64)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("function", ["grpo_loss", "linear_logps"])
def test_row_37_scoring_makes_no_gradient(function, frozen, monkeypatch):
    """Without gradients no tensor is as large as the weight or the hidden states."""
    batch = make_batch(**WIDE)
    batch.completion_mask[:] = True
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_(not frozen)
    op = getattr(ops, function)

    def score():
        FUNCTIONS[function](hidden, weight, batch, workspace_mb=0.05)

    with_gradients = largest_inside(op, score, monkeypatch)
    with torch.no_grad():
        scoring = largest_inside(op, score, monkeypatch)
    assert scoring <= 0.05 * 2**20 < hidden.numel() * 4
    if function == "grpo_loss":
        assert with_gradients >= (hidden if frozen else weight).numel() * 4


@pytest.mark.parametrize("upstream", [0.0, -3.0, 65536.0])
@routes()
def test_row_38_gradients_are_linear_in_the_upstream_gradient(route, upstream):
    """As a loss scaler's: times 0 they are exactly 0."""
    batch = make_batch(**SMALL)
    out, one = run(route, batch, upstream), run(route, batch)
    for x, y in ((out.dhidden, one.dhidden), (out.dweight, one.dweight)):
        if upstream == 0:
            assert (x == 0).all()
        elif x.dtype == torch.float16:  # beyond its range at 65536
            assert upstream == 65536 or relative_error(x, y * upstream) <= GRADIENT_BARS[x.dtype]
        else:
            assert relative_error(x, y * upstream) <= 1e-6


# ---- the same bits -----------------------------------------------------------------------------

IN_A_PROCESS = """
import hashlib, sys
sys.path[:0] = {paths!r}
from fastgrpo.testing import make_batch
from loss_routes import ROUTES, run
digest = hashlib.sha256()
for route in ROUTES:
    for x in run(route, make_batch(**{shape!r})):
        digest.update(x.numpy().tobytes())
print(digest.hexdigest())
"""


@routes()
def test_row_39_the_same_bits_again(route):
    first, *others = (run(route, make_batch(**SMALL)) for _ in range(4))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.slow
def test_row_39_the_same_bits_after_a_restart():
    script, digests = IN_A_PROCESS.format(paths=sys.path, shape=SMALL), set()
    for seed in ("0", "1"):
        child = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        digests.add(child.stdout)
    assert len(digests) == 1
