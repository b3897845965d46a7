"""`selected_logps` against full logits in float64: several ids per token, all its results."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import checks, ops, reference
from fastgrpo.testing import relative_error
from fastgrpo_kernels.runtime import INTERPRETED
from oracle import DTYPES, GRADIENT_BARS, TRANSFORMS, largest_inside, operands

K, ROWS = 5, dict(sequences=2, length=5)
SCORES = ("lse", "entropy")


def selected(ids, vocab, k=K, seed=4):
    """(..., K): each token's own id among others, the first of them twice."""
    g = torch.Generator().manual_seed(seed)
    others = torch.randint(vocab, (*ids.shape, k - 2), generator=g)
    return torch.cat([others, ids[..., None], others[..., :1]], -1)


def upstreams(chosen):
    """Upstream gradients of logps, lse and entropy."""
    g = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=g) for shape in (chosen.shape, *[chosen.shape[:-1]] * 2)]


def exact(hidden, weight, chosen, options, upstream):
    """What `selected_logps` returns, and the gradients, in float64."""
    bias = {"bias": options["bias"]} if "bias" in options else {}
    leaves = {"hidden": hidden, "weight": weight, **bias}
    leaves = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    options = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    transform = options | {k: leaves[k] for k in bias}
    out = reference.selected_logps(leaves["hidden"], leaves["weight"], chosen, **transform)
    total = sum((x * up).sum() for x, up in zip(out, upstream, strict=False))
    return [x.detach() for x in out], torch.autograd.grad(total, list(leaves.values()))


@pytest.mark.parametrize("transform", ["all"] if INTERPRETED else TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_values_and_gradients_equal_full_logits_in_float64(backend, dtype, transform):
    hidden, weight, ids, options = operands(dtype, transform, **ROWS)
    chosen = selected(ids, len(weight))
    upstream = upstreams(chosen)
    wanted, grads = exact(hidden, weight, chosen, options, upstream)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    if "bias" in options:
        leaves.append(options["bias"].requires_grad_())
    out = fastgrpo.selected_logps(hidden, weight, chosen, backend=backend, **options)
    torch.autograd.backward(out[:3], upstream)
    for name, actual, x in zip(out._fields, out, wanted, strict=True):
        assert actual.dtype == torch.float32 and actual.shape == x.shape
        assert (actual - x).abs().max() <= 2e-5, name
    assert relative_error(out.sum_squares, wanted[3]) <= 1e-5
    assert torch.equal(out.logps[..., 0], out.logps[..., -1]), "an id that comes twice"
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf.grad.dtype == dtype
        assert relative_error(leaf.grad, grad) <= GRADIENT_BARS[dtype]


@pytest.mark.parametrize("name", ("logps", *SCORES))
def test_each_result_has_a_gradient_of_its_own(backend, name):
    hidden, weight, ids, _ = operands(**ROWS)
    chosen = selected(ids, len(weight))
    kept = ("logps", *SCORES).index(name)
    upstream = [up * (i == kept) for i, up in enumerate(upstreams(chosen))]
    _, grads = exact(hidden, weight, chosen, {}, upstream)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = fastgrpo.selected_logps(*leaves, chosen, backend=backend)
    assert not out.sum_squares.requires_grad
    actual = torch.autograd.grad(getattr(out, name), leaves, upstream[kept])
    for a, b in zip(actual, grads, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_one_id_is_what_linear_logps_gives(backend):
    hidden, weight, ids, options = operands(transform="all", **ROWS)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    one = fastgrpo.linear_logps(*leaves, ids, entropy="differentiable", backend=backend, **options)
    several = fastgrpo.selected_logps(*leaves, ids[..., None], backend=backend, **options)
    upstream = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0))
    for a, b in ((several.logps[..., 0], one.logps), (several.entropy, one.entropy)):
        assert torch.allclose(a, b, atol=2e-6)
        actual, wanted = (
            torch.autograd.grad(x, leaves, upstream, retain_graph=True) for x in (a, b)
        )
        for x, y in zip(actual, wanted, strict=True):
            assert relative_error(x, y) <= 1e-5
    assert torch.allclose(several.lse, one.lse, atol=2e-6)


def test_ignored_ids_and_tokens_are_zero_and_may_hold_anything(backend):
    hidden, weight, ids, _ = operands(**ROWS)
    chosen = selected(ids, len(weight))
    g = torch.Generator().manual_seed(3)
    ignored = torch.rand(chosen.shape, generator=g) < 0.4
    ignored[0] = True
    upstream = upstreams(chosen)
    upstream[0][ignored] = 0.0
    for up in upstream[1:]:
        up[0] = 0.0
    wanted, grads = exact(hidden, weight, chosen, {}, upstream)
    poisoned = hidden.clone()
    poisoned[0] = torch.nan
    leaves = poisoned.requires_grad_(), weight.requires_grad_()
    out = fastgrpo.selected_logps(
        *leaves, chosen.masked_fill(ignored, -7), ignore_index=-7, backend=backend
    )
    wanted[0][ignored] = 0.0
    for actual, x in zip(out, wanted, strict=True):
        assert (actual[0] == 0).all() and (actual[1:] - x[1:]).abs().max() <= 2e-5
    assert (out.logps[ignored] == 0).all()
    upstream[0][ignored] = torch.nan
    for a, b in zip(torch.autograd.grad(out[:3], leaves, upstream), grads, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_packed_is_padded(backend):
    hidden, weight, ids, options = operands(transform="temperature per token", **ROWS)
    chosen = selected(ids, len(weight))
    padded = fastgrpo.selected_logps(hidden, weight, chosen, backend=backend, **options)
    packed = fastgrpo.selected_logps(
        hidden.flatten(0, 1), weight, chosen.flatten(0, 1), backend=backend,
        temperature=options["temperature"].flatten(),
    )  # fmt: skip
    for a, b in zip(packed, padded, strict=True):
        assert torch.equal(a, b.flatten(0, 1))


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["hidden", "weight"])
def test_only_the_gradients_asked_for_are_made(backend, needs):
    hidden, weight, ids, _ = operands(**ROWS)
    chosen = selected(ids, len(weight))
    upstream = upstreams(chosen)
    _, grads = exact(hidden, weight, chosen, {}, upstream)
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    out = fastgrpo.selected_logps(hidden, weight, chosen, backend=backend)
    torch.autograd.backward(out[:3], upstream)
    for leaf, need, wanted in zip((hidden, weight), needs, grads, strict=True):
        assert (leaf.grad is not None) == need
        assert not need or relative_error(leaf.grad, wanted) <= 1e-5


def test_minus_infinity_masks_vocabulary(backend):
    hidden, weight, ids, _ = operands(**ROWS)
    bias = torch.zeros(len(weight))
    bias[::2] = -torch.inf
    chosen = torch.tensor([0, 1, 2]).expand(*ids.shape, 3).contiguous()
    chosen[0] = torch.tensor([0, 2, 4])  # none of them can be sampled
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = fastgrpo.selected_logps(*leaves, chosen, bias=bias, backend=backend)
    wanted = reference.selected_logps(hidden.double(), weight.double(), chosen, bias=bias.double())
    for actual, x in zip(out, wanted, strict=True):
        assert torch.allclose(actual.double(), x, atol=2e-5)
    assert (out.logps[0] == -torch.inf).all()
    (out.logps[1:, :, 1].sum() + out.entropy.sum()).backward()
    assert weight.grad[::2].eq(0).all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (3, 0, 8)], ids=str)
def test_no_rows_and_one_row(backend, shape):
    hidden = torch.randn(shape, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    ids = torch.zeros((*shape[:-1], 2), dtype=torch.int64)
    out = fastgrpo.selected_logps(hidden, weight, ids, backend=backend)
    (out.logps.sum() + out.lse.sum()).backward()
    assert out.logps.shape == ids.shape and out.sum_squares.shape == shape[:-1]
    assert weight.grad.isfinite().all() and (hidden.numel() or weight.grad.eq(0).all())


def test_nan_at_a_chosen_token_shows(backend):
    hidden, weight, ids, _ = operands(**ROWS)
    hidden[0, 0, 0] = torch.nan
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = fastgrpo.selected_logps(*leaves, selected(ids, len(weight)), backend=backend)
    assert all(x[0, 0].isnan().all() and x[0, 1:].isfinite().all() for x in out)
    for grad in torch.autograd.grad(out.logps.sum(), leaves):
        assert grad.isnan().any()


def test_an_id_that_nobody_looks_at_is_nan_alone(monkeypatch):
    """Beyond the vocabulary, as on a GPU. A caller may leave it out."""
    hidden, weight, ids, options = operands(transform="all", **ROWS)
    leaves = hidden.requires_grad_(), weight.requires_grad_(), options["bias"].requires_grad_()
    chosen = selected(ids, len(weight))
    clean = fastgrpo.selected_logps(hidden, weight, chosen, **options)
    monkeypatch.setattr(checks, "looks_at_values", lambda x: False)
    chosen[0, 0, 1] = len(weight)
    out = fastgrpo.selected_logps(hidden, weight, chosen, **options)
    assert out.logps.isnan().sum() == 1 and out.logps[0, 0, 1].isnan()
    others = ~out.logps.isnan()
    assert torch.allclose(out.logps[others], clean.logps[others], atol=1e-6)
    assert torch.allclose(out.lse, clean.lse, atol=1e-6)
    mine, wanted = (torch.autograd.grad(x.logps[others].sum(), leaves) for x in (out, clean))
    for a, b in zip(mine, wanted, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_gradcheck_in_float64():
    shape = dict(sequences=1, length=3, vocab=11, hidden_size=5)
    hidden, weight, ids, options = operands(transform="all", **shape)
    options = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    leaves = [x.double().requires_grad_() for x in (hidden, weight, options.pop("bias"))]
    chosen = selected(ids, 11)

    def function(hidden, weight, bias):
        return fastgrpo.selected_logps(hidden, weight, chosen, bias=bias, **options)[:3]

    assert torch.autograd.gradcheck(function, leaves)


def test_no_tensor_of_rows_x_vocabulary(monkeypatch):
    hidden, weight, ids, _ = operands(sequences=8, length=64, vocab=4096, hidden_size=16)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    chosen, workspace = selected(ids, 4096), 2**18

    def call():
        out = fastgrpo.selected_logps(*leaves, chosen, workspace_mb=workspace / 2**20)
        torch.autograd.backward(out[:3], upstreams(chosen))

    gathered = 4 * chosen.numel() * 16
    for op in (ops.selected_logps, ops.selected_logps_bwd):
        largest = largest_inside(op, call, monkeypatch)
        assert largest <= max(workspace, gathered, 4 * weight.numel()) < 512 * 4096 * 4 / 16


def test_opcheck():
    hidden, weight, ids, _ = operands(sequences=2, length=4, hidden_size=8, vocab=41)
    chosen = selected(ids, 41).flatten(0, 1)
    mask = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[2] = False
    leaves = hidden.flatten(0, 1).requires_grad_(), weight.requires_grad_()
    bias, temperature = torch.zeros(41, requires_grad=True), torch.rand(8) + 0.5
    arguments = (*leaves, chosen, mask, bias, temperature, 1.0, 0.0, None, "torch")
    torch.library.opcheck(ops.selected_logps, arguments)


def test_compiled_whole():
    hidden, weight, ids, _ = operands(**ROWS)
    chosen = selected(ids, len(weight))
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def loss(hidden, weight):
        out = fastgrpo.selected_logps(hidden.tanh(), weight, chosen)
        return (out.logps * out.sum_squares[..., None]).sum() + out.lse.sum() - out.entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_second_derivatives():
    hidden, weight, ids, _ = operands(**ROWS)
    hidden.requires_grad_()
    out = fastgrpo.selected_logps(hidden, weight, selected(ids, len(weight)))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.logps.sum(), hidden, create_graph=True)


BAD = {
    r"selected_ids: expected shape \(2, 3, K\), K >= 1, got \(2, 3\)": dict(
        selected_ids=torch.zeros(2, 3, dtype=torch.int64)
    ),
    r"selected_ids: expected shape \(2, 3, K\), K >= 1, got \(2, 3, 0\)": dict(
        selected_ids=torch.zeros(2, 3, 0, dtype=torch.int64)
    ),
    "selected_ids: expected dtype int64, got torch.int32": dict(
        selected_ids=torch.zeros(2, 3, 2, dtype=torch.int32)
    ),
    r"selected_ids: expected ids in \[0, 5\) at unmasked tokens, got 5": dict(
        selected_ids=torch.full((2, 3, 2), 5)
    ),
    "selected_ids: expected a tensor, got list": dict(selected_ids=[1]),
    r"weight: expected shape \(V, 4\)": dict(weight=torch.randn(5, 3)),
    "temperature: expected a number > 0, got 0": dict(temperature=0),
    "temperature: expected values > 0": dict(temperature=torch.zeros(2, 3)),
    "softcap: expected a number > 0": dict(softcap=-1.0),
    "logit_scale: expected a finite number": dict(logit_scale=float("inf")),
    r"bias: expected shape \(5,\)": dict(bias=torch.zeros(4)),
    "workspace_mb: expected at least": dict(workspace_mb=1e-6),
    "backend: expected one of": dict(backend="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    given = dict(
        hidden=torch.randn(2, 3, 4),
        weight=torch.randn(5, 4),
        selected_ids=torch.zeros(2, 3, 2, dtype=torch.int64),
    )
    with pytest.raises(ValueError, match=message):
        fastgrpo.selected_logps(**(given | BAD[message]))
