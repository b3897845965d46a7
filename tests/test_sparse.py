"""The sparse backward is unbiased (by enumeration), within its bound, exact where it must be."""

from __future__ import annotations

import math

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig, ops, torch_kernels
from fastgrpo.head import sparse
from fastgrpo.head.loops import logps_bwd, logps_fwd
from fastgrpo.head.plan import Needs, Plan
from fastgrpo.testing import make_batch, relative_error
from fastgrpo.torch_kernels import sparse_entries
from fastgrpo_kernels import Head, Logps, Rows, Upstream
from oracle import HEADS, SEEDS, SHAPE, assert_unbiased, gradients, largest_inside

EVERYTHING = Needs(hidden=True, weight=True, bias=True)


# ---- enumeration: all words of a few bits ------------------------------------------------------


@pytest.fixture
def few_bits(monkeypatch):
    """Words of 10 bits: few enough to run through all of them."""
    for module in (sparse, sparse_entries):
        monkeypatch.setattr(module, "WORD_BITS", 10)
    return 2**10


ROWS_OF_LOGITS = {
    "uniform": torch.zeros(8),
    "one-hot": torch.tensor([30.0, 0, 0, 0, 0, 0, 0, 0]),
    "two points": torch.tensor([9.0, 9, 0, 0, 0, 0, 0, 0]),
    "heavy tail": -2.0 * torch.arange(1.0, 9.0).log(),
    "exactly tau": torch.tensor([0.9, *[0.1 / 7] * 7]).log(),
    "below the smallest word": torch.tensor([0.0, -5, -9, -12, -20, -40, -90, -200]),
}


def enumerated(
    z, target, tau, words, estimate=0.0, softcap=0.0, temperature=1.0, entropy=0.0, overflows=False
):
    """dL/dz0 (words, V) of one row for every row word, and the exact one (V,).

    The head is the identity: hidden states are logits, and their gradient is that of the logits.
    """
    vocab = len(z)
    z = z.double()
    if softcap:
        z = softcap * torch.atanh(z / z.abs().max().clamp(min=1) * 0.9)
    head = Head(torch.eye(vocab, dtype=torch.float64), None, 1.0, softcap)
    rows = Rows(
        z.expand(words, -1).contiguous(),
        torch.full((words,), target),
        torch.full((words,), 1 / temperature, dtype=torch.float64),
    )
    plan = Plan.of(rows.hidden, head.weight, 1.0, torch_kernels)
    scored = logps_fwd(rows, head, plan, with_entropy=True)
    ones = torch.ones(words, dtype=torch.float64)
    upstream = Upstream(ones, entropy * ones if entropy else None)
    columns = torch.randint(words, (vocab,), generator=torch.Generator().manual_seed(0))
    words = sparse.Words(tau, columns.int(), torch.arange(words, dtype=torch.int32))
    _, entries = sparse.logps_and_entries(rows, head, plan, True, words, scored.logps + estimate)
    needs = Needs(hidden=True, weight=False, bias=False)
    assert overflows is None or (entries.overflow(scored) == overflows).all()
    drawn = sparse.entries_bwd(rows, head, plan, scored, upstream, entries, needs)
    exact = logps_bwd(rows, head, plan, scored, upstream, needs)
    return drawn.hidden, exact.hidden[0]


@pytest.mark.parametrize("options", [
    {}, {"estimate": 1.0}, {"estimate": -1.0}, {"softcap": 5.0}, {"temperature": 0.7},
    {"entropy": 0.3}, {"softcap": 5.0, "temperature": 1.3, "entropy": -0.2, "estimate": 0.5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("tau", [0.5, 0.1 / 7, 1e-3])
@pytest.mark.parametrize("target", [0, 5])
@pytest.mark.parametrize("logits", ROWS_OF_LOGITS.values(), ids=ROWS_OF_LOGITS)
def test_the_mean_over_all_words_is_the_exact_gradient(logits, target, tau, options, few_bits):
    # Where the estimate makes tau' more than the root of tau the gradient is dense.
    poor = -options.get("estimate", 0.0) > -0.5 * math.log(tau)
    drawn, exact = enumerated(logits, target, tau, few_bits, overflows=poor, **options)
    assert (drawn.mean(0) - exact).abs().max() <= 1e-12


@pytest.mark.parametrize("tau", [0.5, 0.1 / 7, 1e-3])
@pytest.mark.parametrize("logits", ROWS_OF_LOGITS.values(), ids=ROWS_OF_LOGITS)
def test_the_added_variance_is_bounded(logits, tau, few_bits):
    drawn, exact = enumerated(logits, 0, tau, few_bits)
    own = 1 - logits.double().softmax(0).square().sum()  # of e_y - p with y drawn from p
    assert (drawn - exact).square().sum(1).mean() <= tau / (1 - tau) * own + 1e-15


def test_the_bound_is_a_bound_and_not_a_wall(few_bits):
    """Uniform rows come near it, and what exceeds it is seen: twice tau breaks tau's bound."""
    logits, tau = torch.zeros(64), 0.3
    own = 1 - logits.double().softmax(0).square().sum()

    def added(tau):
        drawn, exact = enumerated(logits, 0, tau, few_bits)
        return (drawn - exact).square().sum(1).mean() / own

    assert 0.5 * tau / (1 - tau) < added(tau) <= tau / (1 - tau) < added(2 * tau)


@pytest.mark.parametrize("few", [20, 33, 46])
def test_near_the_limit_it_is_not_the_draw_that_decides(few, few_bits, monkeypatch):
    """32 of 64 entries are kept on average: replacing rows that kept more would be a bias."""
    monkeypatch.setattr(sparse, "slots", lambda tau, vocab: few)
    drawn, exact = enumerated(torch.zeros(64), 0, 1 / 32, few_bits, overflows=None)
    assert (drawn.mean(0) - exact).abs().max() <= 1e-12


def test_words_are_uniform_and_pairwise_uncorrelated():
    seeds, rows, vocab = 400, 6, 8
    u = torch.stack([
        d.column_words ^ d.row_words[:, None]
        for d in (sparse.Words.of(0.1, torch.tensor(s), rows, vocab) for s in range(seeds))
    ]).double() / 2**sparse.WORD_BITS  # fmt: skip
    u = u.flatten(1)  # (seeds, rows * vocab)
    n = u.numel()
    buckets = torch.bincount((u.flatten() * 16).long(), minlength=16).double()
    assert ((buckets - n / 16).square() / (n / 16)).sum() < 37.7  # chi-square, 15 degrees, 0.999
    correlation = torch.corrcoef(u.t()).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(seeds)
    words = sparse.random_words(torch.tensor(-5), 100_000)
    assert words.min() >= 0 and words.max() < 2**sparse.WORD_BITS
    assert len(words.unique()) > 99_000


# ---- the public functions ----------------------------------------------------------------------


def score_gradients(batch, entropy="none", **options):
    hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
    ids = batch.completion_ids.masked_fill(~batch.completion_mask, -100)
    out = fastgrpo.linear_logps(hidden, weight, ids, entropy=entropy, **options)
    total = (out.logps * batch.advantages[:, None]).sum()
    if entropy == "differentiable":
        total = total + 0.3 * out.entropy.sum()
    total.backward()
    return out, hidden.grad, weight.grad


CONFIGS = {
    "grpo": "grpo",
    "kl": LossConfig.preset("grpo", beta=0.3),
    "gspo": "gspo",
    "dapo": "dapo",
    "bonus": LossConfig.preset("grpo", entropy_coef=0.2),
    "gspo with bonus": LossConfig.preset("gspo", entropy_coef=0.2),
    "differentiable": LossConfig.preset("grpo", entropy="differentiable", entropy_coef=0.2),
    "quantile": LossConfig.preset("dapo", top_entropy_quantile=0.5),
    "reinforce": "reinforce",
}


@pytest.mark.parametrize("old", [True, False], ids=["in the forward", "in a second pass"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_loss_has_the_exact_value_and_the_right_mean(config, old):
    batch = make_batch(**SHAPE, dtype=torch.float64)
    known = {} if old else {"old_logps": None, "ref_logps": None}
    if not old:
        batch = batch._replace(sampler_logps=None)
        if config != "grpo" and getattr(config, "beta", 0):
            pytest.skip("a KL needs ref_logps, and they are an estimate")
    exact, *wanted = gradients(batch, config=config, **known)
    runs = [
        gradients(batch, config=config, sparsity=0.03, seed=seed, **known) for seed in range(SEEDS)
    ]
    for out, *_ in runs[:2]:
        assert abs(out.loss.item() - exact.loss.item()) <= 1e-12
        assert (out.logps - exact.logps).abs().max() <= 1e-12
    for i, gradient in enumerate(wanted, 1):
        assert_unbiased([run[i] for run in runs], gradient)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_head(dtype, head, frozen):
    batch = make_batch(**SHAPE, dtype=dtype)
    if "bias" in head:
        head = {"bias": head["bias"].to(dtype)}
    exact = make_batch(**SHAPE, dtype=dtype)
    exact = exact._replace(hidden=exact.hidden.double(), weight=exact.weight.double())
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in head.items()}
    _, *wanted = gradients(exact, frozen, **double)
    runs = [gradients(batch, frozen, sparsity=0.03, seed=s, **head) for s in range(SEEDS)]
    for i, gradient in enumerate(wanted, 1):
        assert_unbiased([run[i] for run in runs], gradient)


def test_a_bias_would_be_seen(monkeypatch):
    """The check of the mean can fail: keeping only what lies above tau, as truncation does."""
    batch = make_batch(**SHAPE, dtype=torch.float64)
    _, *wanted = gradients(batch)
    middle = torch.full((), 2 ** (sparse.WORD_BITS - 1), dtype=torch.int32)
    words = sparse.random_words

    def truncating(seed, n):
        return torch.where(words(seed, n) < 0, 0, middle)

    monkeypatch.setattr(sparse, "random_words", truncating)
    runs = [gradients(batch, sparsity=0.03, seed=s)[1] + 1e-6 * s for s in range(SEEDS)]
    with pytest.raises(AssertionError, match="dimensions"):
        assert_unbiased(runs, wanted[0])


@pytest.mark.parametrize("entropy", ["none", "detached", "differentiable"])
@pytest.mark.parametrize("old", [True, False], ids=["in the forward", "in the backward"])
def test_log_probs_with_any_upstream_gradient(old, entropy):
    batch = make_batch(**SHAPE, dtype=torch.float64)
    exact, *wanted = score_gradients(batch, entropy)
    known = {"old_logps": batch.old_logps} if old else {}
    runs = [score_gradients(batch, entropy, sparsity=0.03, seed=s, **known) for s in range(SEEDS)]
    assert (runs[0][0].logps - exact.logps).abs().max() <= 1e-12
    for i, gradient in enumerate(wanted, 1):
        assert_unbiased([run[i] for run in runs], gradient)


@pytest.mark.parametrize("estimate", [0.0, -3.0, -60.0, -500.0, torch.nan])
def test_scores_are_exact_whatever_the_estimate(estimate):
    """Exponentials relative to it may overflow, or all of them vanish."""
    batch = make_batch(**{**SHAPE, "logit_std": 30.0})
    ids = torch.randint(301, (6, 11), generator=torch.Generator().manual_seed(0))
    exact = fastgrpo.linear_logps(*(x.double() for x in batch[:2]), ids).logps
    old_logps = torch.full_like(exact, estimate)
    drawn = fastgrpo.linear_logps(
        batch.hidden.requires_grad_(), batch.weight, ids, sparsity=0.01, seed=0,
        old_logps=old_logps,
    ).logps  # fmt: skip
    assert exact.min() < -100
    # 2e-5 is for logits up to 30; these are beyond 100.
    assert (drawn - exact).abs().max() <= 1e-4


def test_without_a_seed_pytorch_draws_one():
    batch = make_batch(**SHAPE)
    torch.manual_seed(3)
    one, other = (gradients(batch, sparsity=0.03) for _ in range(2))
    torch.manual_seed(3)
    again = gradients(batch, sparsity=0.03)
    assert torch.equal(one[1], again[1]) and not torch.equal(one[1], other[1])


def test_a_smaller_tau_is_nearer():
    batch = make_batch(**SHAPE, dtype=torch.float64)
    _, *wanted = gradients(batch)
    errors = [
        relative_error(gradients(batch, sparsity=tau, seed=0)[1], wanted[0])
        for tau in (0.3, 0.03, 0.003, 1e-6)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 2e-3


# ---- estimates, overflow, rows without a gradient ----------------------------------------------

LARGE = dict(sequences=4, length=6, vocab=3000, hidden_size=16, logit_std=1.5, dtype=torch.float64)


def test_rows_that_overflow_are_exact():
    """An estimate that is 8 nats off makes every entry look large: more than there are slots."""
    batch = make_batch(**LARGE, off_policy=0.0)
    old = batch.old_logps.clone()
    old[0] += 8.0
    old[1, 0] = torch.inf
    old[1, 1] = torch.nan
    _, *wanted = score_gradients(batch)
    _, dhidden, _ = score_gradients(batch, sparsity=0.05, seed=0, old_logps=old)
    live = batch.completion_mask
    assert torch.allclose(dhidden[0][live[0]], wanted[0][0][live[0]], rtol=1e-12, atol=0)
    assert not torch.allclose(dhidden[1:][live[1:]], wanted[0][1:][live[1:]], rtol=1e-6, atol=0)
    # One batch, one sequence of it overflowing: exact there, drawn elsewhere, and counted.
    old[1] = batch.old_logps[1]
    out, *_ = gradients(batch._replace(old_logps=old), sparsity=0.05, seed=0)
    share = live[0].sum() / live.sum()
    assert out.metrics["overflow_rows"].item() == pytest.approx(share.item())
    assert out.metrics["kept_entries_max"] == sparse.slots(0.05, 3000)


@pytest.mark.parametrize("off", [-1.0, 1.0])
def test_a_policy_that_moved_by_a_nat_keeps_the_mean(off):
    batch = make_batch(**SHAPE, dtype=torch.float64)
    _, *wanted = score_gradients(batch)
    runs = [
        score_gradients(batch, sparsity=0.03, seed=s, old_logps=batch.old_logps + off)
        for s in range(SEEDS)
    ]
    assert_unbiased([run[1] for run in runs], wanted[0])


def test_rows_without_a_gradient_get_exactly_none():
    batch = make_batch(**SHAPE, dtype=torch.float64)
    batch.advantages[1] = 0.0
    _, dhidden, _ = gradients(batch, sparsity=0.03, seed=0)
    assert (dhidden[1] == 0).all() and (dhidden[~batch.completion_mask] == 0).all()
    nothing = batch._replace(advantages=torch.zeros_like(batch.advantages))
    for dtype in (torch.float64, torch.bfloat16):
        cast = nothing._replace(hidden=batch.hidden.to(dtype), weight=batch.weight.to(dtype))
        for known in (batch.old_logps, None):
            _, *zeros = gradients(cast, sparsity=0.03, seed=0, old_logps=known)
            assert all((x == 0).all() for x in zeros)


def test_a_certain_token_keeps_its_digits():
    """p_y = 1 - 1e-9: the target's entry is 1 - p, not the difference of two numbers near 1."""
    z = torch.full((1, 1, 8), -20.0, dtype=torch.float64)
    z[..., 2] = 2.8
    weight, ids = torch.eye(8, dtype=torch.float64, requires_grad=True), torch.tensor([[2]])
    fastgrpo.linear_logps(
        z, weight, ids, sparsity=0.1, seed=0, old_logps=torch.zeros(1, 1)
    ).logps.sum().backward()
    exact = z.softmax(-1)[..., [0, 1, 3, 4, 5, 6, 7]].sum() * z[0, 0]
    assert torch.allclose(weight.grad[2], exact, rtol=1e-5, atol=0)


def test_what_all_rows_of_the_weight_share_adds_no_variance():
    """Adding one vector to every row changes no probability and no exact gradient."""
    batch = make_batch(**SHAPE, dtype=torch.float64)
    shifted = batch._replace(weight=batch.weight + 7.0)
    one, other = (score_gradients(b, sparsity=0.03, seed=0) for b in (batch, shifted))
    assert torch.allclose(one[1], other[1], rtol=1e-9, atol=1e-12)


def test_an_estimate_far_too_low_is_not_paid_in_variance():
    batch = make_batch(**SHAPE, dtype=torch.float64)
    live = batch.completion_mask
    _, *wanted = score_gradients(batch)
    for far in (
        batch.old_logps - 3.0,
        batch.old_logps - 120.0,
        torch.full_like(batch.old_logps, -torch.inf),
    ):
        _, *found = score_gradients(batch, sparsity=0.03, seed=0, old_logps=far)
        assert torch.allclose(found[0][live], wanted[0][live], rtol=1e-9, atol=1e-12)


def test_a_target_that_cannot_be():
    """Its logit is -inf: no entry, and no NaN from 0 * inf in the entropy's gradient."""
    batch = make_batch(**SHAPE, dtype=torch.float64)
    bias = torch.zeros(301, dtype=torch.float64)
    bias[batch.completion_ids[0, 0]] = -torch.inf
    results = []
    for options in ({}, {"sparsity": 1e-6, "seed": 0}):
        hidden = batch.hidden.clone().requires_grad_()
        out = fastgrpo.linear_logps(
            hidden, batch.weight, batch.completion_ids, bias=bias, entropy="differentiable",
            **options,
        )  # fmt: skip
        out.entropy.sum().backward()
        results.append(hidden.grad)
    assert relative_error(results[1], results[0]) < 1e-4


def test_masked_rows_may_hold_anything():
    batch = make_batch(**SHAPE)
    clean = gradients(batch, sparsity=0.03, seed=0)
    masked = ~batch.completion_mask
    dirty = batch._replace(
        hidden=batch.hidden.masked_fill(masked[..., None], torch.nan),
        completion_ids=batch.completion_ids.masked_fill(masked, 10**6),
        old_logps=batch.old_logps.masked_fill(masked, torch.nan),
    )
    for a, b in zip(clean[1:], gradients(dirty, sparsity=0.03, seed=0)[1:], strict=True):
        assert torch.equal(a, b)


def test_metrics():
    batch = make_batch(**SHAPE)
    tau = 0.03
    out, *_ = gradients(batch, sparsity=tau, seed=0)
    metrics = {name: out.metrics[name].item() for name in sparse.METRICS}
    assert 1 < metrics["kept_entries"] < metrics["kept_entries_max"] <= sparse.slots(tau, 301)
    assert metrics["overflow_rows"] == 0
    gap = (batch.old_logps - out.logps)[batch.completion_mask & (batch.advantages != 0)[:, None]]
    worst = tau * (-gap).exp().max().item()
    assert metrics["variance_bound_max"] == pytest.approx(worst / (1 - worst), rel=1e-4)
    assert not set(sparse.METRICS) & set(gradients(batch)[0].metrics)
    with torch.no_grad():
        silent = fastgrpo.grpo_loss(*batch[:5], sparsity=tau, seed=0)
    assert not set(sparse.METRICS) & set(silent.metrics)


def test_no_tensor_of_rows_by_vocabulary(monkeypatch):
    batch = make_batch(sequences=8, length=64, vocab=4096, hidden_size=16)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    budget = 2**18
    call = lambda: fastgrpo.grpo_loss(  # noqa: E731
        hidden, weight, *batch[2:5], old_logps=batch.old_logps, sparsity=0.05, seed=0,
        workspace_mb=budget / 2**20,
    )  # fmt: skip
    slots = 512 * sparse.slots(0.05, 4096) * 8
    assert largest_inside(ops.grpo_loss, call, monkeypatch) <= max(budget, slots) < 512 * 4096


def test_scores_stand_alone():
    """`Logps` of the sparse route are those of the dense one, with entropy and without."""
    batch = make_batch(**SHAPE)
    rows = Rows(batch.hidden.flatten(0, 1), batch.completion_ids.flatten(), None)
    head = Head(batch.weight, None, 1.0, 0.0)
    plan = Plan.of(rows.hidden, head.weight, None, torch_kernels)
    words = sparse.Words.of(0.1, torch.tensor(0), len(rows.ids), 301)
    for with_entropy in (True, False):
        dense = logps_fwd(rows, head, plan, with_entropy)
        scored, _ = sparse.logps_and_entries(rows, head, plan, with_entropy, words, dense.logps)
        assert isinstance(scored, Logps)
        for a, b in zip(scored, dense, strict=True):
            assert a is b is None or (a - b).abs().max() <= 2e-6
