"""Log-probs and losses over what the sampler could have drawn, against a masked softmax in fp64."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig, Support, ops, reference
from fastgrpo.head import support as over_support
from fastgrpo.testing import make_batch, relative_error, rms
from fastgrpo_kernels.runtime import INTERPRETED
from oracle import (
    DTYPES,
    GRADIENT_BARS,
    PRESETS,
    TRANSFORMS,
    config_of,
    exact,
    exact_logps,
    fused,
    largest_inside,
    live_inside,
    operands,
)
from support_oracle import kept_masks, support_of, whole_where_nothing

VOCAB = 211
SHAPE = dict(sequences=5, length=9, hidden_size=24, vocab=VOCAB)
# How many entries are worth a GEMM: of the vocabulary's 211, by the documented rule 7 and more.
SWITCHES = {"by the rule": None, "all gathered": 0, "all tiled": 10**9}


SLOW_INTERPRETED = [pytest.mark.slow] if INTERPRETED else []


def parameters(names, *quick):
    """Names as test parameters: interpreted, all but the quick ones are slow tests."""
    return [pytest.param(name, marks=[] if name in quick else SLOW_INTERPRETED) for name in names]


@pytest.fixture(autouse=True)
def on_the_backend_of_this_process(backend, monkeypatch):
    monkeypatch.setenv("FASTGRPO_BACKEND", backend)


def exact_support(hidden, weight, ids, kept, options, *upstream):
    return exact_logps(
        hidden, weight, ids, {**options, "kept": whole_where_nothing(kept)}, *upstream
    )


@pytest.mark.parametrize("transform", parameters(TRANSFORMS, "all"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_equal_a_masked_softmax_in_float64(dtype, transform):
    dtype = DTYPES[dtype]
    hidden, weight, ids, options = operands(dtype, transform, **SHAPE)
    kept = kept_masks(ids, VOCAB)
    g = torch.Generator().manual_seed(2)
    upstream = torch.randn((2, *ids.shape), generator=g)
    logps, entropy, lse, grads = exact_support(hidden, weight, ids, kept, options, *upstream)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    if "bias" in options:
        leaves.append(options["bias"].requires_grad_())
    out = fastgrpo.linear_logps(
        hidden, weight, ids, support=support_of(kept, ids), entropy="differentiable", **options
    )
    torch.autograd.backward([out.logps, out.entropy], list(upstream))
    for actual, wanted in zip(out, (logps, entropy, lse), strict=True):
        assert actual.dtype == torch.float32 and actual.shape == ids.shape
        assert (actual - wanted).abs().max() <= 2e-5
    assert rms(out.logps, logps) <= 1e-5
    for leaf, wanted in zip(leaves, grads.values(), strict=True):
        assert leaf.grad.dtype == dtype
        assert relative_error(leaf.grad, wanted) <= GRADIENT_BARS[dtype]


@pytest.mark.parametrize("share", [4, 0], ids=["tiled too", "all gathered"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_as_good_as_plain_torch_with_fp32_logits(dtype, share, monkeypatch):
    """However many kinds of rows add to the weight's gradient, it is rounded once."""
    monkeypatch.setattr(over_support, "GEMM_SHARE", share)
    shape = dict(sequences=24, length=16, hidden_size=24, vocab=31)
    hidden, weight, ids, _ = operands(dtype, **shape)
    kept = kept_masks(ids, 31)
    upstream = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2))
    *_, grads = exact_support(hidden, weight, ids, kept, {}, upstream)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    plain, *_ = reference.token_logps(
        hidden.float(), weight.float(), ids, kept=whole_where_nothing(kept)
    )
    baseline = torch.autograd.grad((plain * upstream).sum(), leaves)
    ours = fastgrpo.linear_logps(hidden, weight, ids, support=support_of(kept, ids)).logps
    actual = torch.autograd.grad((ours * upstream).sum(), leaves)
    for name, a, b in zip(("hidden", "weight"), actual, baseline, strict=True):
        assert relative_error(a, grads[name]) <= 1.25 * relative_error(b, grads[name])


@pytest.mark.parametrize("switch", parameters(SWITCHES, "by the rule"))
def test_where_gathered_rows_give_way_to_tiles_changes_nothing(switch, monkeypatch):
    """And results are those of the same bits each time, whatever the workspace."""
    if SWITCHES[switch] is not None:
        monkeypatch.setattr(over_support, "GEMM_SHARE", SWITCHES[switch])
    hidden, weight, ids, options = operands(transform="all", **SHAPE)
    kept, upstream = kept_masks(ids, VOCAB), torch.ones(ids.shape)
    logps, _, _, grads = exact_support(hidden, weight, ids, kept, options, upstream)
    leaves = hidden.requires_grad_(), weight.requires_grad_(), options["bias"].requires_grad_()
    results = []
    for workspace_mb in (0.004, 0.004, 32.0):
        out = fastgrpo.linear_logps(
            hidden, weight, ids, support=support_of(kept, ids), workspace_mb=workspace_mb, **options
        )
        found = torch.autograd.grad(out.logps.sum(), leaves)
        assert (out.logps - logps).abs().max() <= 2e-5
        for actual, wanted in zip(found, grads.values(), strict=True):
            assert relative_error(actual, wanted) <= 1e-5
        results.append((out.logps, *found))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))


LOSSES = {
    **{name: {} for name in PRESETS},
    "grpo with a KL and both corrections": {
        "beta": 0.1, "correction": "icepop", "rejection": "token_k3", "rejection_max": 0.01,
    },
    "dapo on half of the entropies": {"top_entropy_quantile": 0.5, "entropy": "detached"},
    "dapo with an entropy bonus": {"entropy_coef": 0.1},
    "gspo with a sequence's correction": {"correction": "sequence_tis"},
}  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", parameters(LOSSES, "dapo with an entropy bonus"))
def test_losses_are_those_of_the_renormalised_distribution(name, frozen):
    batch = make_batch(**SHAPE)
    kept = kept_masks(batch.completion_ids, VOCAB)
    head = dict(temperature=0.8, softcap=9.0)
    logps, *_ = reference.token_logps(*batch[:3], kept=whole_where_nothing(kept), **head)
    g = torch.Generator().manual_seed(3)
    batch = batch._replace(**{
        key: (logps + 0.1 * torch.randn(logps.shape, generator=g)).clamp(max=-1e-4)
        for key in ("old_logps", "ref_logps", "sampler_logps")
    })  # fmt: skip
    config = config_of(name.split()[0], **LOSSES[name])
    wanted = exact(batch, config, kept=whole_where_nothing(kept), **head)
    support = support_of(kept, batch.completion_ids)
    out, *grads = fused(batch, config, frozen=frozen, support=support, **head)
    assert out.loss.item() == pytest.approx(wanted[0].item(), rel=1e-5, abs=1e-7)
    for actual, exact_grad in zip(grads, wanted[1:], strict=True):
        assert (actual is None) or relative_error(actual, exact_grad) <= 1e-5
    assert (grads[1] is None) == frozen
    assert (out.logps - logps.masked_fill(~batch.completion_mask, 0)).abs().max() <= 2e-5


def test_packed_rows_and_selected_tokens_are_the_padded_ones():
    batch = make_batch(**SHAPE)
    support = support_of(kept_masks(batch.completion_ids, VOCAB), batch.completion_ids)
    padded, *wanted = fused(batch, "dapo", support=support)
    where = batch.completion_mask.flatten().nonzero()[:, 0]
    flat = Support(support.ids, support.cu).select(where)
    lengths = batch.completion_mask.sum(1)
    hidden, weight = (x.detach().clone().requires_grad_() for x in batch[:2])
    old, ref, sampler = (x.flatten()[where] for x in batch[5:])
    packed = fastgrpo.grpo_loss(
        hidden.flatten(0, 1)[where], weight, batch.completion_ids.flatten()[where], None,
        batch.advantages, cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        old_logps=old, ref_logps=ref, sampler_logps=sampler, support=flat, config="dapo",
    )  # fmt: skip
    packed.loss.backward()
    assert packed.loss.item() == pytest.approx(padded.loss.item(), rel=1e-6)
    for actual, expected in zip((hidden.grad, weight.grad), wanted, strict=True):
        assert relative_error(actual, expected) <= 1e-6
    for name, value in padded.metrics.items():
        assert packed.metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6)


def test_masked_tokens_may_hold_anything():
    batch = make_batch(**SHAPE)
    kept = kept_masks(batch.completion_ids, VOCAB)
    support, masked = support_of(kept, batch.completion_ids), ~batch.completion_mask
    clean = fused(batch, "grpo", support=support)[1:]
    ids = support.ids.clone()
    ids[torch.repeat_interleave(masked.flatten(), support.cu.diff())] += 10**6
    dirty = batch._replace(
        hidden=batch.hidden.masked_fill(masked[..., None], torch.nan),
        completion_ids=batch.completion_ids.masked_fill(masked, -7),
    )
    other = fused(dirty, "grpo", support=Support(ids, support.cu, support.shape))[1:]
    assert all(torch.equal(a, b) for a, b in zip(clean, other, strict=True))


def test_tokens_without_advantage_need_not_be_scored():
    batch = make_batch(**SHAPE)
    batch.advantages[1] = 0.0
    support = support_of(kept_masks(batch.completion_ids, VOCAB), batch.completion_ids)
    wanted = fused(batch, "grpo", support=support)
    actual = fused(batch, "grpo", support=support, skip_zero_advantage=True)
    assert actual[0].loss.item() == pytest.approx(wanted[0].loss.item(), rel=1e-6)
    assert (actual[0].logps[1] == 0).all() and (wanted[0].logps[1] != 0).any()
    for a, b in zip(actual[1:], wanted[1:], strict=True):
        assert relative_error(a, b) <= 1e-6


def test_a_token_with_one_id_has_log_prob_0_and_no_gradient():
    hidden, weight, ids, _ = operands(**SHAPE)
    support = Support.of_lists([[i] for i in ids.flatten().tolist()], torch.ones_like(ids).bool())
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = fastgrpo.linear_logps(*leaves, ids, support=support, entropy="differentiable")
    assert (out.logps == 0).all() and (out.entropy == 0).all()
    assert torch.allclose(out.lse, (hidden * weight[ids]).sum(-1), atol=1e-5)
    for grad in torch.autograd.grad(out.logps.sum() + out.entropy.sum(), leaves):
        assert (grad == 0).all()


# Interpreted, to gather so many rows of the weight takes minutes.
@pytest.mark.parametrize("switch", parameters(["by the rule"] if INTERPRETED else SWITCHES))
def test_a_row_of_a_hundred_thousand_ids_between_empty_rows(switch, monkeypatch):
    if SWITCHES[switch] is not None:
        monkeypatch.setattr(over_support, "GEMM_SHARE", SWITCHES[switch])
    g = torch.Generator().manual_seed(0)
    vocab, n = 120_000, 4
    hidden, weight = torch.randn(n, 8, generator=g), torch.randn(vocab, 8, generator=g)
    listed = torch.randperm(vocab, generator=g)[:100_000]
    ids = torch.tensor([5, listed[-1].item(), 7, 9])
    support = Support.of_lists([[], listed, [], [9, 11]])
    kept = torch.ones(n, vocab, dtype=torch.bool)
    kept[1] = False
    kept[1, listed] = True
    kept[3] = torch.isin(torch.arange(vocab), torch.tensor([9, 11]))
    upstream = torch.randn(n, generator=g)
    logps, _, _, grads = exact_support(hidden, weight, ids, kept, {}, upstream)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = fastgrpo.linear_logps(*leaves, ids, support=support).logps
    assert (out - logps).abs().max() <= 2e-5
    for actual, wanted in zip(
        torch.autograd.grad(out, leaves, upstream), grads.values(), strict=True
    ):
        assert relative_error(actual, wanted) <= 1e-5


def test_lora_on_the_head():
    hidden, weight, ids, _ = operands(**SHAPE)
    kept, g = kept_masks(ids, VOCAB), torch.Generator().manual_seed(1)
    a, b = torch.randn(3, 24, generator=g) / 5, torch.randn(VOCAB, 3, generator=g)
    leaves = [x.double().requires_grad_() for x in (hidden, a, b)]
    logps, *_ = reference.token_logps(
        leaves[0], weight.double() + leaves[2] @ leaves[1], ids, kept=whole_where_nothing(kept)
    )
    wanted = torch.autograd.grad(logps.sum(), leaves)
    mine = [x.requires_grad_() for x in (hidden, a, b)]
    out = fastgrpo.linear_logps(
        hidden, weight, ids, lora=(a, b), support=support_of(kept, ids)
    ).logps
    assert (out - logps).abs().max() <= 2e-5
    for actual, expected in zip(torch.autograd.grad(out.sum(), mine), wanted, strict=True):
        assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("sequences, length", [(0, 3), (2, 0), (1, 1)])
def test_batches_of_nothing(sequences, length):
    hidden, weight = torch.randn(sequences, length, 8), torch.randn(VOCAB, 8)
    ids = torch.zeros(sequences, length, dtype=torch.int64)
    support = Support.of_lists([[]] * ids.numel(), torch.ones_like(ids).bool())
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    outs = [
        fastgrpo.linear_logps(*leaves, ids, support=given, entropy="differentiable")
        for given in (support, None)
    ]
    mine, dense = (torch.autograd.grad(out.logps.sum() + out.entropy.sum(), leaves) for out in outs)
    assert outs[0].logps.shape == ids.shape
    for a, b in zip(mine, dense, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_scoring_top_p_samples_by_the_full_softmax_is_off_policy():
    """Nothing has been learnt, so the ratio to the sampler is 1: with its support, not without."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 20, 32, generator=g), torch.randn(997, 32, generator=g) / 2
    logits = hidden @ weight.T / 0.9
    support = Support.of_logits(logits, top_p=0.9, top_k=200)
    kept = torch.zeros(160, 997, dtype=torch.bool)
    kept[torch.repeat_interleave(support.cu.diff()), support.ids] = True
    sampled = logits.masked_fill(~kept.view(8, 20, 997), -torch.inf).log_softmax(-1)
    ids = torch.multinomial(sampled.exp().flatten(0, 1), 1, generator=g).view(8, 20)
    old_logps = sampled.gather(-1, ids[..., None])[..., 0]
    arguments = (hidden, weight, ids, torch.ones_like(ids).bool(), torch.ones(8))
    gaps = {}
    for name, given in (("support", support), ("full", None)):
        out = fastgrpo.grpo_loss(
            *arguments, old_logps=old_logps, temperature=0.9, support=given, config="dapo"
        )
        gaps[name] = (out.logps - old_logps).abs()
    assert gaps["support"].max() <= 1e-4 and gaps["full"].mean() > 1e-2
    assert out.metrics["ratio_mean"] < 0.95


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes hours for so many entries")
def test_no_tensor_beside_entries_gradients_and_workspace(monkeypatch):
    batch = make_batch(sequences=8, length=64, vocab=4096, hidden_size=16)
    ids = batch.completion_ids
    batch = batch._replace(completion_mask=torch.ones_like(ids).bool())
    # Of eight tokens one has the whole vocabulary, one many ids, the others what is gathered.
    counts = torch.tensor([0, 1000] + [4096 // over_support.GEMM_SHARE] * 6).repeat(64)
    first = ids.flatten() - ids.flatten() % 2
    lists = [(k + torch.arange(n)) % 4096 for k, n in zip(first, counts, strict=True)]
    support = Support.of_lists(lists, batch.completion_mask)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    workspace = 2**18
    call = lambda: fastgrpo.grpo_loss(  # noqa: E731
        hidden, weight, *batch[2:5], old_logps=batch.old_logps, support=support,
        workspace_mb=workspace / 2**20,
    )  # fmt: skip
    entries, gradients = 8 * len(support.ids), 4096 * 16 * 4
    gathered = 6 * 64 * 128 * 16 * 4
    largest = largest_inside(ops.grpo_loss, call, monkeypatch)
    assert largest <= max(workspace, gradients, entries) < gathered < 512 * 4096 * 4
    live = live_inside(ops.grpo_loss, call, monkeypatch)
    assert live <= workspace + 100 * len(support.ids)


# ---- what is refused ---------------------------------------------------------------------------


def refused(**changes):
    ids = torch.tensor([[1, 2, 3]])
    given = dict(support=Support.of_mask(torch.eye(5).bool()[ids]), config="grpo")
    arguments = (torch.randn(1, 3, 4), torch.randn(5, 4), ids, ids.bool(), torch.ones(1))
    return fastgrpo.grpo_loss(*arguments, **{**given, **changes})


BAD = {
    "support: expected a fastgrpo.Support, got list": dict(support=[[1], [2], [3]]),
    r"support: expected one of tokens \(1, 3\), got \(3,\)": dict(
        support=Support.of_lists([[1], [2], [3]])
    ),
    "support.ids: expected a tensor on cpu, got one on meta": dict(
        support=Support.of_mask(torch.eye(5).bool()[None, :3]).to("meta")
    ),
    "sparsity: expected 0 with support": dict(sparsity=0.1),
    r"support: expected ids in \[0, 5\) at unmasked tokens, got 9": dict(
        support=Support.of_lists([[1], [2, 9], [3]], torch.ones(1, 3).bool())
    ),
    "completion_ids: expected ids within their support at unmasked tokens, got 2": dict(
        support=Support.of_lists([[1], [4, 0], [3]], torch.ones(1, 3).bool())
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        refused(**BAD[message])


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_nobody_looks_at_is_nan_and_reaches_no_gather(switch, monkeypatch):
    """A token outside its support, and an id beyond the vocabulary, as on a GPU."""
    if SWITCHES[switch] is not None:
        monkeypatch.setattr(over_support, "GEMM_SHARE", SWITCHES[switch])
    monkeypatch.setattr(fastgrpo.checks, "looks_at_values", lambda x: False)
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    support = Support.of_lists([[0, 1], [2, 3], [4, 9]])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    logps = fastgrpo.linear_logps(
        *leaves, torch.tensor([0, 4, 4]), bias=torch.zeros(5), support=support
    ).logps
    assert logps.isnan().tolist() == [False, True, True]
    (dhidden,) = torch.autograd.grad(logps.sum(), hidden)
    assert dhidden[0].isfinite().all() and dhidden[0].any() and dhidden[2].isnan().all()


# ---- torch.library and torch.compile -----------------------------------------------------------


def test_opcheck():
    hidden, weight, ids, _ = operands(sequences=2, length=4, hidden_size=8, vocab=41)
    support = support_of(kept_masks(ids, 41), ids)
    flat, mask = ids.flatten(), torch.arange(8) != 2
    rows = (hidden.flatten(0, 1).requires_grad_(), weight.requires_grad_(), flat, mask)
    head = (None, None, None, support.ids, support.cu, 1.0, 0.0, None, "torch")
    torch.library.opcheck(ops.linear_logps, (*rows, *head, True, False, 0.0, None, None))
    call = (torch.tensor([0, 4, 8]), torch.ones(2), *(None,) * 7, LossConfig().key)
    torch.library.opcheck(ops.grpo_loss, (*rows, *head, *call, True, True, False, False, 0.0, None))


def test_compiled_is_eager_and_compiles_twice_at_most():
    """However the number of entries varies from call to call."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(hidden, weight, ids, mask, advantages, support):
        return fastgrpo.grpo_loss(
            hidden.tanh(), weight, ids, mask, advantages, support=support, config="dapo"
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend=counting)
    batch = make_batch(**SHAPE)
    for seed in range(5):
        support = support_of(kept_masks(batch.completion_ids, VOCAB, seed), batch.completion_ids)
        hidden, weight = (x.detach().clone().requires_grad_() for x in batch[:2])
        results = [
            torch.autograd.grad(f(hidden, weight, *batch[2:5], support), (hidden, weight))
            for f in (step, compiled)
        ]
        for eager, traced in zip(*results, strict=True):
            assert torch.allclose(eager, traced, rtol=1e-6, atol=1e-8)
    assert 1 <= len(graphs) <= 3
