"""Rows 10 to 14 and 21 of the fault matrix: how tensors lie in memory, and their dtypes."""

from __future__ import annotations

import pytest
import torch

from fastgrpo.testing import Batch, make_batch, relative_error
from fastgrpo_kernels.runtime import INTERPRETED
from loss_routes import FUNCTIONS, LOG_PROBS, assert_same, exact, leaves, log_probs, routes, run
from oracle import GRADIENT_BARS

SMALL = dict(sequences=3, length=4, hidden_size=16)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def every_second(x):
    """Columns with a stride of 2."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def transposed(x):
    return x if x.dim() < 2 else x.transpose(-2, -1).contiguous().transpose(-2, -1)


def rows_apart(x):
    """Rows further apart than they are long."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    wide[..., :-3] = x
    return wide[..., :-3]


def misaligned(x):
    """The second element of its storage is the first of the tensor: not at 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("lie", [every_second, transposed, rows_apart], ids=lambda f: f.__name__)
@routes()
def test_row_10_any_strides(backend, route, lie):
    batch = make_batch(**SMALL)
    strided = Batch(*(lie(x) for x in batch))
    assert_same(run(route, strided, backend=backend), run(route, batch, backend=backend))


@routes()
def test_row_13_an_odd_storage_offset(backend, route):
    batch = make_batch(**SMALL)
    moved = Batch(*(misaligned(x) for x in batch))
    assert moved.hidden.data_ptr() % 16 and moved.weight.data_ptr() % 16
    assert_same(run(route, moved, backend=backend), run(route, batch, backend=backend))


def gradients(route, batch, upstream, backend):
    batch, options, trained = leaves(route, batch)
    logps = log_probs(route, batch, backend=backend, **options)
    return torch.autograd.grad(logps, (batch.hidden, trained), upstream)


@routes(of=LOG_PROBS)
def test_row_11_an_expanded_upstream_gradient(backend, route):
    """As `sum` sends it: a number with strides of 0."""
    batch = make_batch(**SMALL)
    number = torch.tensor(0.3).expand(batch.completion_mask.shape)
    expanded = gradients(route, batch, number, backend)
    for x, y in zip(expanded, gradients(route, batch, number.clone(), backend), strict=True):
        assert torch.equal(x, y)


@routes(of=LOG_PROBS)
def test_row_12_an_upstream_gradient_for_each_token(backend, route):
    """A row's gradient is its own number times that of 1; those of the weight add up."""
    batch = make_batch(**SMALL)
    one = torch.ones_like(batch.old_logps)
    own = torch.randn(one.shape, generator=torch.Generator().manual_seed(3))
    own[0, 1] = 0.0
    dhidden, dweight = gradients(route, batch, own, backend)
    bar = 2e-3 if dhidden.dtype == FP16 else 1e-5
    unit = gradients(route, batch, one, backend)
    assert (dhidden[0, 1] == 0).all()
    assert relative_error(dhidden, unit[0] * own[..., None]) <= bar
    rest = gradients(route, batch, one - own, backend)
    # A draw of its own for each backward, with errors of its own.
    if "sparse" not in route:
        assert relative_error(dweight, unit[1] - rest[1]) <= 2 * bar


SIZES = [(33, 257), (1, 2), (40, 513)] if INTERPRETED else [(33, 257), (1, 2), (63, 50_257)]


@pytest.mark.parametrize("hidden_size, vocab", SIZES)
@routes(without=("sparse",))
def test_row_14_sizes_that_fill_no_tile(backend, route, hidden_size, vocab):
    batch = make_batch(sequences=2, length=3, hidden_size=hidden_size, vocab=vocab)
    assert_same(run(route, batch, backend=backend), exact(route, batch))


# ---- dtypes ------------------------------------------------------------------------------------

TAKEN = {(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32), (FP64, FP64)}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("weight", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("hidden", [BF16, FP16, FP32, FP64], ids=str)
def test_row_21_every_pair_of_dtypes(backend, function, hidden, weight):
    """Results of 16-bit inputs have fp32, gradients the dtypes of what they are of."""
    batch, call = make_batch(**SMALL), FUNCTIONS[function]
    h, w = batch.hidden.to(hidden).requires_grad_(), batch.weight.to(weight).requires_grad_()
    pair = (hidden, weight)
    if pair not in TAKEN or (backend == "triton" and hidden == FP64):
        with pytest.raises(ValueError, match="(hidden|weight): expected dtype"):
            call(h, w, batch, backend=backend)
        return
    out = call(h, w, batch, backend=backend)
    assert out.dtype == torch.promote_types(hidden, FP32)
    grads = torch.autograd.grad(out.sum(), (h, w))
    wide = [x.detach().double().requires_grad_() for x in (h, w)]
    wanted = torch.autograd.grad(call(*wide, batch, backend="torch").sum(), wide)
    for leaf, x, y in zip((h, w), grads, wanted, strict=True):
        assert x.dtype == leaf.dtype
        assert relative_error(x, y) <= GRADIENT_BARS.get(leaf.dtype, 1e-5)
