"""The loops as a GPU runs them: 16-bit GEMM operands, fp32 results, target entries kept apart.

CPUs cannot multiply 16-bit operands into fp32 results, so `matmul` is emulated; the rest is the
real code. It runs on the torch backend, and with TRITON_INTERPRET=1 on the Triton kernels.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fastgrpo_kernels
from fastgrpo import LossConfig, reference, torch_kernels
from fastgrpo.head import loops, selected, support
from fastgrpo.head.held import AnchoredExponentials
from fastgrpo.head.plan import Needs, Plan
from fastgrpo.head.routes import loss_and_grads
from fastgrpo.objective.call import LossCall
from fastgrpo.objective.segments import Sequences
from fastgrpo.packing import spread, unmasked
from fastgrpo.testing import make_batch, relative_error, rms
from fastgrpo_kernels import Head, Rows, Upstream
from fastgrpo_kernels.runtime import INTERPRETED
from oracle import GRADIENT_BARS, exact, exact_logps, operands
from row_oracle import (
    CHUNKING,
    NEEDS,
    TRANSFORMED,
    Linear,
    check_gradients_from_exponentials,
    rows_with_upstream,
)
from support_oracle import kept_masks, support_of, whole_where_nothing

BACKENDS = {"triton": fastgrpo_kernels, "torch": torch_kernels}


@pytest.fixture
def gpu_plan():
    """A plan as a GPU has it, with kernels whose GEMM takes operands of 16 bits."""
    operands = []

    def matmul(out, a, b, accumulate=False):
        if a.dtype != out.dtype:
            operands.append(a.dtype)
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.add_(product) if accumulate else out.copy_(product)

    def plan(hidden, weight, backend="triton", workspace_mb=None, **changes):
        kernels = vars(BACKENDS[backend]) | {"matmul": matmul}
        chosen = Plan.of(hidden, weight, workspace_mb, SimpleNamespace(**kernels))
        mixed = dict(operand=hidden.dtype, slice_width=32, chunk_width=32)
        return chosen._replace(**mixed | changes)

    yield plan
    assert {torch.bfloat16, torch.float16} & set(operands)


CHUNKS = {"several chunks": 53 * 6 * 100 / 2**20, "one chunk": None}
FROZEN = {"trainable": False, "frozen": True}
NORMALIZERS = [2**18] if INTERPRETED else [2**12, 2**14, 2**16, 2**18]
if INTERPRETED:  # at ten milliseconds a row the first of each has to do
    CHUNKS, FROZEN = ({name: x[name] for name in list(x)[:1]} for x in (CHUNKS, FROZEN))


@pytest.mark.parametrize("workspace_mb", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
@pytest.mark.parametrize("logit_std", [1.0, 6.0], ids=["flat", "peaked"])
def test_gradients_lose_nothing_to_16_bit_tiles(
    gpu_plan, backend, logit_std, preset, frozen, workspace_mb
):
    batch = make_batch(
        sequences=16, length=32, hidden_size=48, dtype=torch.bfloat16, logit_std=logit_std
    )
    config = LossConfig.preset(preset, beta=0.1, entropy_coef=0.0 if frozen else 0.1)
    actual, wanted = gradients(gpu_plan, backend, batch, config, frozen, workspace_mb)
    # Plain torch in fp32 rounds its gradients to bf16 once: 1.25 times that is allowed. Rounding
    # the tile too gives up to sqrt(2) where one entry makes up a row: other batches reach 1.28.
    for gradient, exact_grad in zip(actual, wanted, strict=True):
        bar = 1.25 * relative_error(exact_grad.bfloat16(), exact_grad)
        assert gradient is None or relative_error(gradient.bfloat16(), exact_grad) <= bar


def gradients(
    gpu_plan, backend, batch, config, frozen, workspace_mb, normalizer=None, temperature=None,
    live=None,
):  # fmt: skip
    """Of the loss, with respect to hidden and weight: by the loops, and in float64.

    `live`: sequences after the first so many are known to have no gradient.
    """
    options = {} if temperature is None else {"temperature": temperature.double()}
    loss, *wanted = exact(batch, config, normalizer=normalizer, **options)
    hidden, ids, mask, old, ref, sampler = (
        x.flatten(0, 1) for x in (batch.hidden, *batch[2:4], *batch[5:])
    )
    plan = gpu_plan(hidden, batch.weight, backend, workspace_mb)
    sequences, length = batch.completion_ids.shape
    cu_seqlens = length * torch.arange(sequences + 1)
    call = LossCall(
        cu_seqlens, batch.advantages, old, ref, sampler, None, None, normalizer, None, config.key
    )
    where, owner = unmasked(mask), Sequences.of(cu_seqlens, mask)
    objective = call.objective(owner, mask, where, plan.kernels, torch.float32)
    inverse = None if temperature is None else temperature.flatten()[where].reciprocal()
    rows, needs = Rows(hidden[where], ids[where], inverse), Needs(True, not frozen, False)
    num_live = int(mask[: length * live].sum()) if live else len(rows.ids)
    _, result, grads, _ = loss_and_grads(
        objective, rows, Head(batch.weight), plan, needs, None, num_live
    )
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    return (spread(grads.hidden, where, len(mask)).view(batch.hidden.shape), grads.weight), wanted


def test_several_ids_a_row_lose_nothing_to_16_bit_tiles(gpu_plan, backend):
    """The likeliest of them is the target of the tiles: 1 - p of it is never rounded to 16 bits."""
    batch = make_batch(sequences=2, length=8, hidden_size=48, dtype=torch.bfloat16, logit_std=6.0)
    hidden, weight = batch.hidden.flatten(0, 1), batch.weight
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    ids = reference.logits(*leaves).topk(3).indices.flip(-1)
    exact_logps, *exact_scores = reference.selected_logps(*leaves, ids)
    dlogps = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad((exact_logps * dlogps).sum(), leaves)
    rows, head, plan = Rows(hidden, ids), Head(weight), gpu_plan(hidden, weight, backend)
    chosen, nothing = torch.ones_like(ids).bool(), torch.zeros(len(ids))
    scored = selected.logps_fwd(rows, head, plan, chosen)
    for actual, x in zip(scored, (exact_logps, *exact_scores), strict=True):
        assert (actual - x).abs().max() <= 2e-5
    needs = Needs(True, True, False)
    upstream = selected.SelectedUpstream(dlogps, nothing, None)
    grads = selected.logps_bwd(rows, head, plan, chosen, scored, upstream, needs)
    for actual, exact_grad in zip(grads, wanted, strict=False):
        bar = 1.25 * relative_error(exact_grad.bfloat16(), exact_grad)
        assert relative_error(actual.bfloat16(), exact_grad) <= bar


# ---- fp16: what is small is lost ---------------------------------------------------------------


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("workspace_mb", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_fp16_gradients_of_a_large_batch(
    gpu_plan, backend, preset, frozen, workspace_mb, normalizer
):
    """Divided by the number of tokens, dL/dlogp times a probability is below fp16's range."""
    batch = make_batch(sequences=16, length=32, hidden_size=48, dtype=torch.float16)
    config = LossConfig.preset(preset, beta=0.1, entropy_coef=0.0 if frozen else 0.1)
    denominator = torch.tensor(float(normalizer))
    actual, wanted = gradients(gpu_plan, backend, batch, config, frozen, workspace_mb, denominator)
    assert_fp16_gradients(actual, wanted)


def assert_fp16_gradients(actual, wanted):
    """They stay fp32, for a loss scaler; a tile rounded to fp16 costs 3e-4."""
    for gradient, exact_grad in zip(actual, wanted, strict=True):
        if gradient is not None:
            assert gradient.dtype == torch.float32
            assert relative_error(gradient, exact_grad) <= 2e-3


@pytest.mark.parametrize("workspace_mb", CHUNKS.values(), ids=CHUNKS)
def test_fp16_gradients_with_temperatures_and_rows_known_to_have_none(
    gpu_plan, backend, workspace_mb
):
    batch = make_batch(sequences=16, length=32, hidden_size=48, dtype=torch.float16)
    batch.advantages[12:] = 0
    temperature = torch.linspace(0.5, 2.0, 16)[:, None].expand(16, 32)
    given = (False, workspace_mb, torch.tensor(1e5), temperature, 12)
    assert_fp16_gradients(*gradients(gpu_plan, backend, batch, LossConfig.preset("grpo"), *given))


@pytest.mark.parametrize("workspace_mb", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("nats", [8.0, 11.0])
def test_fp16_gradients_at_extreme_ratios(gpu_plan, backend, nats, workspace_mb):
    """Ratios of up to 60,000 fit above the one of 1 that the range was chosen for."""
    batch = make_batch(sequences=16, length=32, hidden_size=48, dtype=torch.float16)
    batch = batch._replace(old_logps=batch.old_logps - nats)
    config = LossConfig.preset("reinforce", surrogate="importance_sampling", ratio_level="token")
    given = (False, workspace_mb, torch.tensor(1e5))
    assert_fp16_gradients(*gradients(gpu_plan, backend, batch, config, *given))


def test_fp16_gradients_of_rows_beside_one_that_is_not_finite(gpu_plan, backend):
    batch = make_batch(sequences=8, length=16, dtype=torch.float16)
    hidden, ids = batch.hidden.flatten(0, 1), batch.completion_ids.flatten()
    rows, head = Rows(hidden, ids), Head(batch.weight)
    plan = gpu_plan(hidden, batch.weight, backend)
    scored = loops.logps_fwd(rows, head, plan, False)
    upstream = torch.linspace(-1e-6, 1e-6, len(ids))
    needs = NEEDS["frozen"]
    wanted = loops.logps_bwd(rows, head, plan, scored, Upstream(upstream), needs).hidden
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = Upstream(upstream.index_fill(0, torch.tensor(3), bad))
        actual = loops.logps_bwd(rows, head, plan, scored, spoilt, needs).hidden
        assert not actual[3].isfinite().any()
        others = torch.arange(len(ids)) != 3
        assert torch.equal(actual[others], wanted[others])


def test_log_probs_bias_and_softcap(gpu_plan, backend):
    batch = make_batch(sequences=8, length=16, dtype=torch.bfloat16)
    hidden, ids = batch.hidden.flatten(0, 1), batch.completion_ids.flatten()
    head = Head(batch.weight, torch.randn(len(batch.weight)).bfloat16(), 0.7, 9.0)
    doubles = [x.double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    logps, _, _ = reference.token_logps(
        *doubles[:2], ids, bias=doubles[2], logit_scale=0.7, softcap=9.0
    )
    upstream = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad((logps * upstream).sum(), doubles)
    rows, plan = Rows(hidden, ids), gpu_plan(hidden, head.weight, backend)
    scored = loops.logps_fwd(rows, head, plan, False)
    assert rms(scored.logps, logps) <= 1e-5
    grads = loops.logps_bwd(rows, head, plan, scored, Upstream(upstream), NEEDS["trainable"])
    for actual, exact_grad in zip(grads, wanted, strict=True):
        rounding = relative_error(exact_grad.bfloat16(), exact_grad)
        assert relative_error(actual.bfloat16(), exact_grad) <= 1.25 * rounding


@pytest.mark.parametrize("workspace_mb", CHUNKS.values(), ids=CHUNKS)
def test_an_adapter_on_the_head(gpu_plan, backend, workspace_mb):
    """Hidden states and the weight have three more columns; dweight is of these alone."""
    batch = make_batch(sequences=8, length=16, dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    ids, low = batch.completion_ids.flatten(), torch.randn(8 * 16, 3, generator=g)
    hidden = torch.cat([batch.hidden.flatten(0, 1), low.bfloat16()], 1)
    head = Head(batch.weight, lora=torch.randn(len(batch.weight), 3, generator=g).bfloat16())
    whole = torch.cat([head.weight, head.lora], 1)
    leaves = [x.double().requires_grad_() for x in (hidden, whole)]
    logps, _, _ = reference.token_logps(*leaves, ids)
    upstream = torch.randn(logps.shape, generator=g)
    dhidden, dweight = torch.autograd.grad((logps * upstream).sum(), leaves)
    rows, plan = Rows(hidden, ids), gpu_plan(hidden, head.weight, backend, workspace_mb)
    needs = Needs(True, True, False)
    scored, made = loops.logps_and_grads(rows, head, plan, needs, Linear(upstream))
    assert rms(scored.logps, logps) <= 1e-5
    recomputed = loops.logps_bwd(rows, head, plan, scored, Upstream(upstream), needs)
    for grads in (made, recomputed):
        for actual, wanted in zip(grads, (dhidden, dweight[:, -3:]), strict=False):
            rounding = relative_error(wanted.bfloat16(), wanted)
            assert relative_error(actual.bfloat16(), wanted) <= 1.25 * rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows_at_once", [16, 32])
def test_targets_are_scattered_once_a_chunk_where_dweight_is_whole(gpu_plan, rows_at_once, dtype):
    """A launch costs as much for a slice as for all of them. fp16 weights have fp32 gradients."""
    batch = make_batch(sequences=2, length=16, dtype=dtype)
    rows = Rows(batch.hidden.flatten(0, 1), batch.completion_ids.flatten())
    plan = gpu_plan(rows.hidden, batch.weight, "torch", chunk=rows_at_once)
    starts = []

    def scatter_rows(acc, sorted_ids, order, coef, hidden, vocab_start):
        starts.append((vocab_start, len(acc)))

    plan.kernels.scatter_rows = scatter_rows
    needs, vocab = Needs(True, True, False), len(batch.weight)
    loops.logps_and_grads(rows, Head(batch.weight), plan, needs, Linear(torch.ones(32)))
    if rows_at_once < 32 or dtype == torch.float16:
        assert starts == [(0, vocab)] * (32 // rows_at_once)
    else:
        assert starts == [(start, min(32, vocab - start)) for start in range(0, vocab, 32)]


# ---- from exponentials -------------------------------------------------------------------------


@pytest.mark.skipif(not INTERPRETED, reason="the kernel makes them")
@pytest.mark.parametrize("rows_at_once, dead", CHUNKING.values(), ids=CHUNKING)
@pytest.mark.parametrize("options", TRANSFORMED.values(), ids=TRANSFORMED)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("logit_std", [1.0, 6.0], ids=["flat", "peaked"])
def test_gradients_from_exponentials(gpu_plan, logit_std, needs, options, rows_at_once, dead):
    given = rows_with_upstream(logit_std, options, dead, sequences=16, length=32, hidden_size=48)
    plan = gpu_plan(given.rows.hidden, given.head.weight, exps_rows=rows_at_once)
    plan.kernels.tile_stats = None  # of the other way
    check_gradients_from_exponentials(given, plan, needs)


@pytest.mark.skipif(not INTERPRETED, reason="the kernel makes them")
def test_exponentials_are_taken_where_they_suffice():
    """Not for fp16, whose range they leave, nor for an entropy gradient."""
    batch = make_batch(dtype=torch.bfloat16)

    def taken(dtype, entropy_gradient):
        rows = Rows(batch.hidden.flatten(0, 1).to(dtype), batch.completion_ids.flatten())
        head = Head(batch.weight.to(dtype))
        plan = Plan.of(rows.hidden, head.weight, None, fastgrpo_kernels)._replace(operand=dtype)
        loss = Linear(torch.ones(len(rows.ids)), entropy_gradient)
        held = loops._held(rows, head, plan, NEEDS["trainable"], loss)
        return isinstance(held, AnchoredExponentials)

    assert taken(torch.bfloat16, False)
    assert not taken(torch.bfloat16, True)
    assert not taken(torch.float16, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_support(gpu_plan, backend, dtype):
    """Rows of every kind; the logits of those with many ids are products of 16-bit operands."""
    hidden, weight, ids, _ = operands(dtype, sequences=3, length=8, hidden_size=16, vocab=97)
    kept, g = kept_masks(ids, 97), torch.Generator().manual_seed(2)
    dlogps, dentropy = torch.randn((2, *ids.shape), generator=g)
    logps, entropy, lse, wanted = exact_logps(
        hidden, weight, ids, {"kept": whole_where_nothing(kept)}, dlogps, dentropy
    )
    given = support_of(kept, ids)
    entries = support.Kept(given.ids, given.cu)
    rows, head = Rows(hidden.flatten(0, 1), ids.flatten()), Head(weight)
    plan = gpu_plan(rows.hidden, weight, backend)
    scored, z = support.logps_fwd(rows, head, plan, entries, True)
    for actual, exact_scores in zip(scored, (logps, lse, entropy), strict=True):
        assert (actual - exact_scores.flatten()).abs().max() <= 2e-5
    upstream = Upstream(dlogps.flatten(), dentropy.flatten())
    needs = Needs(hidden=True, weight=True, bias=False)
    grads = support.logps_bwd(rows, head, plan, entries._replace(values=z), scored, upstream, needs)
    for actual, name in ((grads.hidden, "hidden"), (grads.weight, "weight")):
        exact_grad = wanted[name].flatten(0, -2)
        assert relative_error(actual, exact_grad) <= GRADIENT_BARS[dtype]
