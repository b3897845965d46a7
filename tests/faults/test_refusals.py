"""Rows 21, 26, 28, 36, 41 and 44 of the fault matrix: what is refused, by the argument's name."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastgrpo
from fastgrpo import FusedLM, LossConfig, Support
from fastgrpo.testing import make_batch
from loss_routes import FUNCTIONS, call, leaves, routes
from model_families import VOCAB, tiny

SMALL = dict(sequences=3, length=4, hidden_size=16)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("hidden, bias", [
    (BF16, FP16), (BF16, FP64), (FP32, BF16), (FP32, FP64), (BF16, torch.int64),
])  # fmt: skip
def test_row_21_a_bias_of_another_dtype(function, hidden, bias):
    batch = make_batch(**SMALL)
    h, w = batch.hidden.to(hidden), batch.weight.to(hidden)
    with pytest.raises(ValueError, match="bias: expected dtype"):
        FUNCTIONS[function](h, w, batch, bias=torch.zeros(len(w), dtype=bias))


@pytest.mark.parametrize("function", ["grpo_loss", "linear_logps"])
@pytest.mark.parametrize("factor", [0, 1])
def test_row_21_an_adapter_of_another_dtype(function, factor):
    batch = make_batch(**SMALL)
    factors = [torch.zeros(2, 16), torch.zeros(len(batch.weight), 2)]
    factors[factor] = factors[factor].half()
    with pytest.raises(ValueError, match=rf"lora\[{factor}\]: expected dtype"):
        FUNCTIONS[function](*batch[:2], batch, lora=tuple(factors))


STRANGE = {
    "complex": (lambda x: x.to(torch.complex64), "expected dtype"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "expected dtype"),
    "int8": (lambda x: x.to(torch.int8), "expected dtype"),
    "sparse": (lambda x: x.to_sparse(), "expected a dense tensor, got one of layout"),
    "nested": (lambda x: torch.nested.as_nested_tensor([x]), "expected a dense tensor, got a nest"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_row_21_no_tensor_of_another_kind(function, kind, name):
    batch, (make, message) = make_batch(**SMALL), STRANGE[kind]
    operands = {"hidden": batch.hidden, "weight": batch.weight}
    operands[name] = make(operands[name])
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        FUNCTIONS[function](*operands.values(), batch)


SHARDED = {
    "bias": lambda b: torch.zeros(len(b.weight)),
    "temperature": lambda b: torch.ones(b.old_logps.shape),
    "lora[0]": lambda b: torch.zeros(2, 16),
}


@pytest.mark.parametrize("function, name", [
    (function, name) for function in FUNCTIONS for name in ("hidden", "weight", *SHARDED)
    if (function, name) != ("selected_logps", "lora[0]")  # it takes no adapter
])  # fmt: skip
def test_row_28_no_sharded_tensor(function, name, alone):
    batch, mesh = make_batch(**SMALL), init_device_mesh("cpu", (1,))
    given = {"hidden": batch.hidden, "weight": batch.weight}
    given[name] = given[name] if name in given else SHARDED[name](batch)
    given[name] = distribute_tensor(given[name], mesh, [Shard(0)])
    if name == "lora[0]":
        given["lora"] = (given.pop(name), torch.zeros(len(batch.weight), 2))
    with pytest.raises(ValueError, match="expected a plain tensor, got a DTensor; gather") as error:
        FUNCTIONS[function](given.pop("hidden"), given.pop("weight"), batch, **given)
    assert str(error.value).startswith(f"{name}: ")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 16)])
def test_row_28_no_weight_that_was_not_gathered(function, shape):
    """As ZeRO-3 leaves it outside of a forward."""
    batch = make_batch(**SMALL)
    with pytest.raises(ValueError, match=r"^weight: .*\(an empty weight is a shard that was not"):
        FUNCTIONS[function](batch.hidden, torch.zeros(shape), batch)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@routes()
def test_row_36_no_second_derivative(route, frozen):
    batch, options, trained = leaves(route, make_batch(**SMALL))
    value, _ = call(route, batch, **options)
    wanted = (batch.hidden,) if frozen else (batch.hidden, trained)
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        torch.autograd.grad(value, wanted, create_graph=True)
    with pytest.raises(RuntimeError, match="create_graph must be False"):
        value.backward(create_graph=True)


def test_row_36_no_second_derivative_of_a_model():
    lm = FusedLM(tiny("qwen2"))
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6).expand(2, 6) > 2
    for advantages in (torch.tensor([1.0, -1.0]), None):
        out = lm(ids, None, mask, advantages)
        value = out.logps.sum() if advantages is None else out.loss
        with pytest.raises(RuntimeError, match="create_graph must be False"):
            torch.autograd.grad(value, list(lm.parameters())[:1], create_graph=True)


TEMPERATURES = {
    "0": 0, "0.0": 0.0, "negative": -1.0, "nan": math.nan, "inf": math.inf, "a bool": True,
    "None": None, "text": "1", "a list": [1.0],
    "tensor of 0": torch.tensor(0.0), "negative tensor": torch.tensor(-1.0),
    "tensor of nan": torch.tensor(math.nan), "tensor of inf": torch.tensor(math.inf),
    "an int tensor": torch.tensor(1), "another shape": torch.ones(1),
    "0 at a token": torch.ones(3, 4) - torch.eye(3, 4),
    "learnt": torch.ones((), requires_grad=True),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPERATURES)
def test_row_41_temperatures_that_are_refused(name):
    batch, bad = make_batch(**SMALL), TEMPERATURES[name]
    batch.completion_mask[:] = True
    calls = [
        lambda: fastgrpo.grpo_loss(*batch[:5], temperature=bad),
        lambda: fastgrpo.grpo_loss(
            *batch[:5], temperature=bad, config=LossConfig(entropy="differentiable")
        ),
        lambda: fastgrpo.linear_logps(*batch[:3], temperature=bad),
        lambda: fastgrpo.linear_logps(*batch[:3], temperature=bad, sparsity=0.01),
        lambda: fastgrpo.selected_logps(*batch[:2], batch[2][..., None], temperature=bad),
    ]
    if name != "learnt":  # a support has no gradient in any case
        calls.append(lambda: Support.of_logits(torch.randn(3, 4, 7), bad, top_k=2))
    for refused in calls:
        with pytest.raises(ValueError, match="temperature: expected"):
            refused()


def test_row_41_a_model_refuses_them_too():
    lm, ids = FusedLM(tiny("qwen2")), torch.tensor([[5, 6, 7]])
    for advantages in (None, torch.ones(1)):
        with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
            lm(ids, None, torch.tensor([[False, True, True]]), advantages, temperature=0)


TRANSFORMS = {
    "a softcap": lambda z: 5 * torch.tanh(z / 5),
    "a temperature": lambda z: z / 0.7,
    "columns that are masked": lambda z: z.masked_fill(torch.arange(VOCAB) > VOCAB - 5, -1e4),
    "a bias": lambda z: z + torch.arange(VOCAB) / VOCAB,
    "a square": lambda z: z * z.abs(),
    "probabilities": lambda z: z.softmax(-1),
}


@pytest.mark.parametrize("attach", [FusedLM, fastgrpo.head_of], ids=["FusedLM", "head_of"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_row_44_a_transform_of_the_logits_that_nobody_knows(transform, attach):
    model = tiny("qwen2")
    own = model.forward

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = transform(out.logits)
        return out

    attach(model)
    model.forward = forward
    with pytest.raises(fastgrpo.UnsupportedHeadError, match="its hidden states and head"):
        attach(model)
