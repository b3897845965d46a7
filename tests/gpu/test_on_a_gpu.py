"""Every function launched on a GPU, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
import fastgrpo_kernels
import row_oracle
import score_oracle
from fastgrpo import LossConfig, torch_kernels
from fastgrpo.advantages.estimators import ESTIMATORS
from fastgrpo.head.plan import Plan
from fastgrpo.objective.presets import PRESETS
from fastgrpo.testing import make_batch, relative_error, rms
from fastgrpo_kernels import (
    anchored_logps,
    anchored_logps_fwd,
    anchored_variant,
    segment_reduce,
    token_loss,
)
from fastgrpo_kernels.anchored_variant import SWITCH, anchored_launch
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS, KL_GRADIENTS
from fastgrpo_kernels.runtime import LAUNCHES, architecture
from fastgrpo_kernels.surrogates import SURROGATES
from oracle import (
    DTYPES,
    GRADIENT_BARS,
    TRANSFORMS,
    config_of,
    exact,
    exact_logps,
    fused,
    operands,
    valid_batch,
)
from oracle import PRESETS as ROUTED

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHAPES = {
    "aligned": dict(sequences=8, length=128, hidden_size=256, vocab=4096),
    "ragged": dict(sequences=5, length=37, hidden_size=200, vocab=5003),
}


def moved(x, device=DEVICE):
    """A tensor, or a tuple of anything, on a device."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if not isinstance(x, tuple):
        return x
    parts = [moved(part, device) for part in x]
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)


def test_autocast_gives_products_of_16_bits():
    batch = moved(make_batch(**SHAPES["ragged"]))
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]

    def run(*operands):
        loss = fastgrpo.grpo_loss(*operands, *batch[2:5], old_logps=batch.old_logps).loss
        return loss, *torch.autograd.grad(loss, operands)

    wanted = run(*half)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = run(hidden, weight)
    for x, y in zip(actual, wanted, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y.float())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_log_probs(dtype, transform, shape):
    hidden, weight, ids, options = operands(dtype, transform, **shape)
    upstream = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0))
    logps, entropy, lse, grads = exact_logps(hidden, weight, ids, options, upstream)
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    hidden, weight, ids = (x.to(DEVICE) for x in (hidden, weight, ids))
    leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
    if "bias" in options:
        leaves["bias"] = options["bias"].requires_grad_()
    out = fastgrpo.linear_logps(hidden, weight, ids, entropy="detached", **options)
    out.logps.backward(upstream.to(DEVICE))
    for actual, wanted in zip(out, (logps, entropy, lse), strict=True):
        assert (actual.cpu() - wanted).abs().max() <= 2e-5
    assert rms(out.logps.cpu(), logps) <= 1e-5
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad.cpu(), grads[name]) <= GRADIENT_BARS[dtype], name


@pytest.mark.parametrize("workspace_mb", [None, 1.0], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("preset", ROUTED)
def test_losses(preset, dtype, frozen, workspace_mb):
    batch = make_batch(**SHAPES["ragged"], dtype=dtype)
    config = config_of(preset, beta=0.1, entropy_coef=0.0 if frozen else 0.1)
    loss, dhidden, dweight = exact(batch, config)
    out, *grads = fused(moved(batch), config, frozen=frozen, workspace_mb=workspace_mb)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    for actual, wanted in zip(grads, (dhidden, dweight), strict=True):
        assert actual is None or relative_error(actual.cpu(), wanted) <= GRADIENT_BARS[dtype]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name):
    batch = valid_batch(**SHAPES["ragged"], off_policy=0.05)
    length = {"max_completion_length": 40} if name == "dr_grpo" else {}
    drawn = {"cov_ratio": 1.0} if name == "clip_cov" else {}
    config = LossConfig.preset(name, beta=0.1, **length, **drawn)
    loss, dhidden, dweight = exact(batch, config)
    b = moved(batch)
    hidden, weight = b.hidden.requires_grad_(), b.weight.requires_grad_()
    out = fastgrpo.grpo_loss(
        hidden, weight, *b[2:5], old_logps=b.old_logps, ref_logps=b.ref_logps,
        sampler_logps=b.sampler_logps, config=config,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    for actual, wanted in ((hidden.grad, dhidden), (weight.grad, dweight)):
        assert relative_error(actual.cpu(), wanted) <= 1e-4


def assert_same_as_the_twin(loss, separate):
    # On an edge itself a GPU's exp, which is not correctly rounded, may take either branch.
    tokens = row_oracle.off_the_edges(row_oracle.loss_tokens())
    wanted = torch_kernels.token_loss(tokens, loss, separate)
    for x, y in zip(token_loss(moved(tokens), loss, separate), wanted, strict=True):
        if y is not None:
            torch.testing.assert_close(x.cpu(), y, rtol=1e-5, atol=1e-5)


def grid(names, *sampled):
    """Parameters, all but the sampled ones with the mark of hundreds of kernels to compile."""
    assert set(sampled) <= set(names)
    return [n if n in sampled else pytest.param(n, marks=pytest.mark.grid) for n in names]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", grid(SURROGATES, "ppo_clip", "vespo"))
def test_every_surrogate_is_its_twin(name, separate):
    assert_same_as_the_twin(row_oracle.loss_of(name, beta=0.07), separate)


@pytest.mark.parametrize("gradient", grid(KL_GRADIENTS, "importance"))
@pytest.mark.parametrize("kl", grid(KL_ESTIMATORS, "k3"))
def test_every_kl_is_its_twin(kl, gradient):
    """With one surrogate: all of them would be 500 kernels to compile."""
    for separate in (False, True):
        loss = row_oracle.loss_of("ppo_clip", kl=kl, kl_gradient=gradient, beta=0.07)
        assert_same_as_the_twin(loss, separate)


def test_segments():
    cu = torch.tensor([0, 0, 1, 71, 71, 103, 108])
    x = torch.randn(108)
    for op in ("sum", "max"):
        actual = segment_reduce(x.to(DEVICE), cu.to(DEVICE), op).cpu()
        torch.testing.assert_close(actual, torch_kernels.segment_reduce(x, cu, op))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype):
    hidden, weight, ids, _ = operands(dtype, **SHAPES["aligned"])
    hidden, ids = hidden.flatten(0, 1).to(DEVICE), ids.flatten().to(DEVICE)
    weight = weight.to(DEVICE)
    whole = fastgrpo.linear_logps(hidden, weight, ids).logps
    for some in (torch.arange(7), torch.randperm(len(ids))[:300]):
        some = some.to(DEVICE)
        alone = fastgrpo.linear_logps(hidden[some], weight, ids[some]).logps
        assert torch.equal(alone, whole[some])


@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_runs_repeat_bit_for_bit(preset):
    batch = moved(make_batch(**SHAPES["aligned"], dtype=torch.bfloat16))
    first = fused(batch, LossConfig.preset(preset, beta=0.1))
    for _ in range(4):
        again = fused(batch, LossConfig.preset(preset, beta=0.1))
        assert torch.equal(first[0].loss, again[0].loss)
        assert all(torch.equal(a, b) for a, b in zip(first[1:], again[1:], strict=True))


@pytest.mark.parametrize("estimator", [
    name for name, rule in ESTIMATORS.items() if rule.needs in ((), ("lengths",)) and name != "gdpo"
])  # fmt: skip
def test_advantages(estimator, monkeypatch):
    rewards = torch.randn(64, generator=torch.Generator().manual_seed(0))
    rewards[3] = torch.nan
    lengths = torch.arange(64) % 9 + 1 if ESTIMATORS[estimator].needs else None
    for groups in (8, torch.arange(64) % 7):
        r, g, n = moved((rewards, groups, lengths))
        actual = fastgrpo.group_advantages(r, g, lengths=n, estimator=estimator)
        with monkeypatch.context() as on_cpu:
            on_cpu.setenv("FASTGRPO_BACKEND", "torch")
            wanted = fastgrpo.group_advantages(
                rewards, groups, lengths=lengths, estimator=estimator
            )
        assert torch.allclose(actual.cpu(), wanted, atol=1e-5)


def test_more_logits_than_an_int32_counts():
    """N * V beyond 2**31: addresses must be 64 bits wide."""
    rows, vocab, hidden_size = 2**14, 2**18, 64
    hidden = torch.randn(rows, hidden_size, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocab, hidden_size, device=DEVICE, dtype=torch.bfloat16) / 8
    ids = torch.randint(vocab, (rows,), device=DEVICE)
    logps = fastgrpo.linear_logps(hidden, weight, ids).logps
    last = slice(rows - 4, rows)
    z = hidden[last].double() @ weight.double().T
    wanted = z.log_softmax(-1).gather(1, ids[last, None])[:, 0]
    assert (logps[last] - wanted).abs().max() <= 2e-5


def test_a_capture_is_refused_and_goes_on():
    """The error comes before what would spoil the capture."""
    batch = moved(make_batch(**SHAPES["ragged"]))
    ids, hidden = batch.completion_ids.clamp(min=0), batch.hidden.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice = hidden * 2
        with pytest.raises(RuntimeError, match="outside of a CUDA graph"):
            fastgrpo.linear_logps(twice, batch.weight, ids)
    hidden.fill_(3.0)
    graph.replay()
    assert (twice == 6).all()


def test_a_loss_waits_for_the_host_twice_at_most():
    batch = moved(make_batch(**SHAPES["aligned"], dtype=torch.bfloat16))
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()

    def run():
        fastgrpo.grpo_loss(hidden, weight, *batch[2:5], old_logps=batch.old_logps).loss.backward()

    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # A row count, and how many rows were not clipped.
    assert len([w for w in waits if "synchronizing" in str(w.message)]) <= 2


# ---- the anchored kernel -----------------------------------------------------------------------


@pytest.fixture
def hopper():
    """The launch entries of this part, where it has any."""
    key = (16, architecture(torch.device(DEVICE)))
    if key not in LAUNCHES["anchored_logps"]:
        pytest.skip("no entry for this part")
    return LAUNCHES["anchored_logps"][key], LAUNCHES["anchored_logps_small_h"].get(key)


@pytest.fixture(
    params=[(72, "0"), (72, "1"), (1024, "0"), (1024, "1"), (2048, "0")],
    ids="H {0[0]}, specialised {0[1]}".format,
)
def size(request, hopper, monkeypatch):
    """H, with and without specialised warps where there is a choice."""
    hidden_size, specialise = request.param
    if specialise == "1" and hopper[1] is None:
        pytest.skip("one variant only")
    monkeypatch.setenv(SWITCH, specialise)
    return hidden_size


@pytest.mark.parametrize("transform", score_oracle.TRANSFORMS.values(), ids=score_oracle.TRANSFORMS)
@pytest.mark.parametrize("dtype", score_oracle.DTYPES, ids=str)
def test_anchored_log_probs(size, dtype, transform):
    operands = transform(*score_oracle.problem(300, 50_021, size, dtype))
    result = anchored_logps_fwd(*moved(operands), True)
    assert not result.redone.any()
    score_oracle.assert_accurate(moved(result.scored, "cpu"), score_oracle.oracle(*operands))


@pytest.mark.parametrize("transform", score_oracle.TRANSFORMS.values(), ids=score_oracle.TRANSFORMS)
def test_anchored_exponentials_and_marks(hopper, transform):
    n, vocab, tau = 300, 5003, 1e-2
    operands = transform(*score_oracle.problem(n, vocab, 200, torch.bfloat16))
    exps = torch.empty((n, 5008), dtype=torch.bfloat16, device=DEVICE)[:, :vocab]
    result = anchored_logps_fwd(*moved(operands), True, exps=exps)
    score_oracle.assert_exps(exps.cpu(), moved(result, "cpu"), *operands)

    lse = score_oracle.oracle(*operands)[1]
    marks = score_oracle.marks_of(n, vocab, (lse + torch.tensor(tau).log()).float())
    on_gpu = moved(marks)
    anchored_logps_fwd(*moved(operands), False, marks=on_gpu)
    score_oracle.assert_marks(moved(on_gpu, "cpu"), *operands)


def test_anchored_rows_beyond_the_safe_range(hopper):
    gaps = [20.0, 8.0, 60.0, 0.0, -40.0, -100.0, -120.0, -200.0, -1000.0] * 40
    operands = score_oracle.confident(gaps)
    exps = torch.empty((len(gaps), 608), dtype=torch.bfloat16, device=DEVICE)[:, :601]
    result = moved(anchored_logps_fwd(*moved(operands), True, exps=exps), "cpu")
    assert result.redone.tolist() == [gap < -109 for gap in gaps]
    exact_scores = score_oracle.oracle(*operands)
    score_oracle.assert_accurate(result.scored, exact_scores, atol=6e-5, rms=3e-5)
    score_oracle.assert_exps(exps.cpu(), result, *operands)


def test_anchored_rows_have_the_same_bits_in_any_batch(size):
    rows, head = moved(score_oracle.problem(1000, 5003, size, torch.bfloat16))
    rows.hidden[::50] *= 8  # some of them are done again
    whole = anchored_logps_fwd(rows, head, True)
    for some in (torch.arange(7), torch.randperm(1000)[:300]):
        some = some.to(DEVICE)
        alone, wanted = anchored_logps_fwd(rows[some], head, True), whole[some]
        for a, w in zip(alone.scored, wanted.scored, strict=True):
            assert torch.equal(a, w)
        assert torch.equal(alone.log_scale, wanted.log_scale)
        assert torch.equal(alone.redone, wanted.redone)


@pytest.fixture
def specialised(hopper, monkeypatch):
    """The entry that specialises warps, after its trial: here a deadlock would end all tests."""
    if hopper[1] is None:
        pytest.skip("one variant only")
    monkeypatch.setenv(SWITCH, "1")
    launch = anchored_launch(torch.empty(8, 1024, device=DEVICE), True)
    assert set(anchored_variant._REFUSED.values()) == {""}
    assert launch is hopper[1]
    return launch


@pytest.mark.parametrize("hidden_size", [64, 512, 1024, 1536])
def test_specialised_warps_give_the_same_sums(hopper, specialised, hidden_size):
    """Many times: what could go wrong is a race."""
    operands = moved(score_oracle.problem(1000, 50_021, hidden_size, torch.bfloat16))
    anchor = torch.full((1000,), 40.0, device=DEVICE)

    def sums(launch):
        partials, kernel = anchored_logps._sum_tiles(launch, *operands, anchor, True)
        return partials, "ttg.warp_specialize" in kernel.asm["ttgir"]

    expected, engaged = sums(hopper[0])
    assert not engaged
    for _ in range(50):
        actual, engaged = sums(specialised)
        assert engaged
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0)


def test_a_capture_before_any_trial(hopper, monkeypatch):
    """It has no trial, and takes the variant that needs none."""
    operands = moved(score_oracle.problem(300, 5003, 1024, torch.bfloat16))
    monkeypatch.setenv(SWITCH, "0")
    wanted = anchored_logps_fwd(*operands, True).scored
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(anchored_variant, "_REFUSED", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = anchored_logps_fwd(*operands, True).scored
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
    assert not anchored_variant._REFUSED


@pytest.mark.parametrize(
    "rows_at_once, dead", row_oracle.CHUNKING.values(), ids=row_oracle.CHUNKING
)
@pytest.mark.parametrize("options", row_oracle.TRANSFORMED.values(), ids=row_oracle.TRANSFORMED)
@pytest.mark.parametrize("needs", row_oracle.NEEDS.values(), ids=row_oracle.NEEDS)
@pytest.mark.parametrize("logit_std", [1.0, 6.0], ids=["flat", "peaked"])
def test_gradients_from_exponentials(hopper, logit_std, needs, options, rows_at_once, dead):
    given = row_oracle.rows_with_upstream(logit_std, options, dead, DEVICE, **SHAPES["ragged"])
    plan = Plan.of(given.rows.hidden, given.head.weight, None, fastgrpo_kernels)
    plan = plan._replace(exps_rows=rows_at_once)
    row_oracle.check_gradients_from_exponentials(given, plan, needs)


def test_anchored_log_probs_never_wait_for_the_host(size):
    operands = moved(score_oracle.problem(300, 5003, size, torch.bfloat16))
    anchored_logps_fwd(*operands, True)  # compiles, and tries its variants
    torch.cuda.set_sync_debug_mode("error")
    try:
        anchored_logps_fwd(*operands, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
