"""`patch()`: fastgrpo's log-probs where TRL's head calls its autograd function."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

pytest.importorskip("trl", minversion="1.15")

import trl  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Shard, distribute_tensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402
from trl.experimental.async_grpo import (  # noqa: E402
    AsyncGRPOConfig,
    AsyncGRPOTrainer,
    async_grpo_trainer,
)
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer import utils  # noqa: E402

from fastgrpo.integrations.trl import chunked_head, patch  # noqa: E402
from fastgrpo.testing import relative_error  # noqa: E402
from trl_runs import OFFLINE, grpo, logged  # noqa: E402

PAIRS = Dataset.from_list(
    [{"prompt": f"{i}+{i % 7}=", "chosen": str(i + i % 7), "rejected": "+"} for i in range(16)]
)
LABELLED = Dataset.from_list(
    [{"prompt": f"{i}+1=", "completion": str(i), "label": i % 2 == 0} for i in range(16)]
)
SENTENCES = Dataset.from_list([{"text": f"{i}+{i % 7}={i + i % 7}"} for i in range(16)])
SUPERVISED = {"SFT": SENTENCES, "DPO": PAIRS, "KTO": LABELLED}


@pytest.fixture(autouse=True)
def said_nothing_yet():
    chunked_head.say_once.cache_clear()


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the hidden states that fastgrpo scores."""
    seen, original = [], chunked_head.linear_logps

    def spy(hidden, *args, **kwargs):
        seen.append(tuple(hidden.shape))
        return original(hidden, *args, **kwargs)

    monkeypatch.setattr(chunked_head, "linear_logps", spy)
    return seen


def function():
    return getattr(utils, chunked_head.NAME)


def supervised(name, folder, output):
    """A trainer that needs no rollout."""
    args = getattr(trl, f"{name}Config")(
        output_dir=str(output), max_steps=2, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, learning_rate=1e-2, **OFFLINE,
    )  # fmt: skip
    data = {"train_dataset": SUPERVISED[name]}
    return getattr(trl, f"{name}Trainer")(model=str(folder), args=args, **data)


def asynchronous(folder, output, monkeypatch):
    """No rollout worker and no server is started: both come from outside. Nobody asks a GPU."""
    monkeypatch.setattr(async_grpo_trainer, "VLLMClient", lambda *_: SimpleNamespace())
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)
    args = AsyncGRPOConfig(output_dir=str(output), use_cpu=True, bf16=False, report_to="none")
    outside = SimpleNamespace(rollout_buffer=None)
    return AsyncGRPOTrainer(
        model=str(folder), args=args, train_dataset=PAIRS, reward_funcs=lambda **_: [0.0],
        rollout_worker=outside, weight_transfer=outside,
    )  # fmt: skip


TRAINERS = {
    "GRPO": lambda folder, output: grpo(
        GRPOTrainer, folder, output, max_steps=2, num_iterations=2, beta=0.04
    ),
    "RLOO": lambda folder, output: grpo(
        RLOOTrainer,
        folder,
        output,
        RLOOConfig,
        max_steps=2,
        num_iterations=2,
        beta=0.04,
        learning_rate=2e-4,
    ),
    **{
        name: lambda folder, output, name=name: supervised(name, folder, output)
        for name in SUPERVISED
    },
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_learns_the_same(name, folder, tmp_path, calls):
    """Two steps: the loss, the norm of the gradient and every metric."""
    stock = TRAINERS[name](folder, tmp_path)
    stock.train()
    assert not calls
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with patch():
            ours = TRAINERS[name](folder, tmp_path)
            ours.train()
    assert calls
    wanted, actual = logged(stock), logged(ours)
    assert len(wanted) == 2 and wanted[-1]["grad_norm"] > 0.01
    for theirs, step in zip(wanted, actual, strict=True):
        assert step == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_the_asynchronous_trainer_scores_with_it(folder, tmp_path, calls, monkeypatch):
    with patch():
        trainer = asynchronous(folder, tmp_path, monkeypatch)
        # Its own attention is a GPU's.
        trainer.model.set_attn_implementation("eager")
        ids = torch.tensor([[3, 4, 5]])
        trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert calls


def operands(dtype=torch.float32, weight_dtype=None, bias=False, rows=33):
    torch.manual_seed(0)
    hidden = torch.randn(rows, 24).to(dtype)
    weight = (0.5 * torch.randn(57, 24)).to(weight_dtype or dtype)
    added = torch.randn(57).to(weight_dtype or dtype) if bias else None
    leaves = [None if x is None else x.requires_grad_() for x in (hidden, weight, added)]
    return *leaves, torch.randint(57, (rows,))


def results(apply, given, *options):
    """Log-probs, entropies and the gradients of a mixture of both."""
    hidden, weight, bias, targets = given
    logps, entropy, *_ = apply(hidden, weight, bias, targets, *options)
    torch.manual_seed(1)
    upstream = torch.randn(2, len(targets), dtype=logps.dtype)
    total = (upstream[0] * logps).sum()
    total = total if entropy is None else total + (upstream[1] * entropy).sum()
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    return logps, entropy, torch.autograd.grad(total, leaves)


OPTIONS = {
    "plain": (1.0, 16, None, 1.0, ("log_probs", "entropy")),
    "log-probs alone": (1.0, 16, None, 1.0, ("log_probs",)),
    "temperature": (0.7, 16, None, 1.0, ("log_probs", "entropy")),
    "softcap": (1.0, 16, 5.0, 1.0, ("log_probs", "entropy")),
    "scale": (1.0, 16, None, 0.25, ("log_probs", "entropy")),
    "all": (0.7, 16, 5.0, 2.0, ("log_probs", "entropy")),
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_function_itself(options, bias):
    """Values and gradients are those of TRL's function, in fp32."""
    given = operands(bias=bias)
    wanted = results(ChunkedLogProbFunction.apply, given, *options)
    with patch(), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of TRL's runs
        actual = results(function().apply, given, *options)
    torch.testing.assert_close(actual[0], wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(actual[2], wanted[2], strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_a_frozen_head():
    hidden, weight, bias, targets = operands(bias=True)
    given = hidden, weight.detach(), bias.detach(), targets
    wanted = results(ChunkedLogProbFunction.apply, given, *OPTIONS["plain"])
    with patch():
        actual = results(function().apply, given, *OPTIONS["plain"])
    assert len(actual[2]) == 1 and relative_error(actual[2][0], wanted[2][0]) <= 1e-5


DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "fp16": (torch.float16, torch.float16, False),
    "bf16, head fp32": (torch.bfloat16, torch.float32, False),
    "fp32, head bf16": (torch.float32, torch.bfloat16, False),
    "fp64": (torch.float64, torch.float64, False),
    "autocast, fp32": (torch.float32, torch.float32, True),
    "autocast, states bf16": (torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("case", DTYPES)
def test_dtypes(case):
    """As TRL's, of values and gradients. Logits are not rounded, so that values are nearer."""
    dtype, weight_dtype, autocast = DTYPES[case]
    given = operands(dtype, weight_dtype, bias=True)
    options = OPTIONS["plain"]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        wanted = results(ChunkedLogProbFunction.apply, given, *options)
        with patch():
            actual = results(function().apply, given, *options)
    assert [x.dtype for x in (*actual[:2], *actual[2])] == [
        x.dtype for x in (*wanted[:2], *wanted[2])
    ]
    # What the product sees: autocast rounds the hidden states, as in TRL.
    seen = given[0].bfloat16() if autocast else given[0]
    exact = [x.double().detach() for x in (seen, *given[1:3])]
    logits = exact[0] @ exact[1].T + exact[2]
    logps = logits.log_softmax(-1).gather(1, given[3][:, None])[:, 0]
    assert (actual[0] - logps).abs().max() <= 1e-5
    if torch.bfloat16 in (dtype if dtype == weight_dtype else None, autocast and torch.bfloat16):
        assert (wanted[0] - logps).abs().max() > 1e-3
    for ours, theirs in zip(actual[2], wanted[2], strict=True):
        assert relative_error(ours, theirs) <= (2e-2 if seen.dtype.itemsize == 2 else 1e-5)


@pytest.fixture
def model(folder):
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    utils.add_fused_lm_head(made, temperature=0.8, outputs=("log_probs", "entropy"))
    return made


def model_results(model, labels):
    ids = torch.randint(2, 14, labels.shape, generator=torch.Generator().manual_seed(0))
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    total = out.loss + (out.log_probs * out.entropy.detach()).sum()
    return out, torch.autograd.grad(total, list(model.parameters()))


def test_ignored_targets(model, compact, calls):
    labels = torch.randint(2, 14, (3, 9), generator=torch.Generator().manual_seed(1))
    labels[:, :4] = -100
    labels[1, 6:] = -100
    wanted, gradients = model_results(model, labels)
    with patch():
        out, actual = model_results(model, labels)
    assert calls == [((labels[:, 1:] != -100).sum() if compact else 3 * 8, 32)]
    torch.testing.assert_close(out.log_probs, wanted.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy, wanted.entropy, rtol=1e-5, atol=1e-5)
    assert out.log_probs[1, 5:].eq(0).all() and out.log_probs[1, 3:5].ne(0).all()
    for ours, theirs in zip(actual, gradients, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_a_batch_without_a_target(model, compact, calls):
    """Zero, with gradients that are zero and not missing."""
    with patch():
        out, gradients = model_results(model, torch.full((2, 5), -100))
    assert calls and out.loss.item() == 0
    assert all(g.eq(0).all() for g in gradients)


OTHERS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("asked", [(name,) for name in OTHERS[1:]] + [OTHERS], ids=str)
def test_other_outputs_are_those_of_trl_and_said_once(asked, calls):
    hidden, weight, bias, targets = operands()
    options = hidden, weight, bias, targets, 0.7, 16, 5.0, 2.0, asked
    wanted = ChunkedLogProbFunction.apply(*options)
    with patch(), pytest.warns(UserWarning) as said:
        actual = function().apply(*options)
        function().apply(*options)
    assert len(said) == 1 and len(calls) == 2
    assert all(name in str(said[0].message) for name in asked if name != "entropy")
    for ours, theirs in zip(actual, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert ours.requires_grad == theirs.requires_grad
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_defaults_are_those_of_trl():
    given = operands()
    wanted = ChunkedLogProbFunction.apply(*given, 0.7, 16)
    with patch(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        actual = function().apply(*given, 0.7, 16)
    for ours, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_sharded_heads_are_left_to_trl(monkeypatch, calls):
    """TRL gathers them again in its backward."""
    monkeypatch.setattr(chunked_head, "is_deepspeed_zero3_enabled", lambda: True)
    given = operands()
    with patch(), pytest.warns(UserWarning, match="ZeRO-3"):
        actual = function().apply(*given, *OPTIONS["plain"])
    assert not calls
    assert torch.equal(actual[0], ChunkedLogProbFunction.apply(*given, *OPTIONS["plain"])[0])


def test_a_head_that_was_gathered_is_refused_where_it_is_trained(alone, calls):
    """The gradient that TRL gives its shards is not reduced over the ranks."""
    hidden, weight, _, targets = operands()
    bias = torch.zeros(len(weight))
    mesh, given = init_device_mesh("cpu", (1,)), OPTIONS["plain"]
    shards, biases = (distribute_tensor(x.detach(), mesh, [Shard(0)]) for x in (weight, bias))
    frozen = shards.full_tensor(), biases.full_tensor()
    trained = shards.requires_grad_().full_tensor(), biases.requires_grad_().full_tensor()
    with patch():
        function().apply(hidden, *frozen, targets, *given)
        for head in ((trained[0], frozen[1]), (frozen[0], trained[1])):
            with pytest.raises(RuntimeError, match="lm_head: .* sharded by itself"):
                function().apply(hidden, *head, targets, *given)
    assert len(calls) == 1


def test_leaving_restores():
    before = function()
    with patch():
        assert function() is not before
        inner = function()
        with patch():
            assert function() is inner, "one patch"
        assert function() is inner
    assert function() is before
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert function() is before


def test_a_plain_call_lasts():
    before = function()
    first = patch()
    try:
        installed = function()
        patch()
        with patch():
            pass
        assert function() is installed is not before
        with first:
            assert function() is installed
        assert function() is before
        with first:
            assert function() is not before
        assert function() is before
    finally:
        setattr(utils, chunked_head.NAME, before)


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0.dev0", "2.0.0"])
def test_other_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(trl, "__version__", version)
    before = function()
    with pytest.raises(RuntimeError, match=rf"expected .*1\.15.*1\.17.*got {version}"):
        patch()
    assert function() is before


@pytest.mark.parametrize("version", ["1.15.0", "1.16.0.dev0", "1.16.3"])
def test_versions_that_are_known(version, monkeypatch):
    monkeypatch.setattr(trl, "__version__", version)
    before = function()
    with patch():
        assert function() is not before


class OneMore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, z_loss=0.0):
        raise AssertionError


class OtherDefault(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None,
        logit_scale=1.0, outputs=("entropy",),
    ):  # fmt: skip
        raise AssertionError


@pytest.mark.parametrize("other, named", [
    (OneMore, "z_loss=0.0"), (OtherDefault, "outputs=('entropy',)"), (None, "None"),
])  # fmt: skip
def test_other_signatures_are_refused(other, named, monkeypatch):
    monkeypatch.setattr(utils, chunked_head.NAME, other)
    with pytest.raises(RuntimeError, match=r"expected .* targets, .*logit_scale=1\.0") as refusal:
        patch()
    assert named in str(refusal.value).split(", got ")[1]
    assert function() is other
