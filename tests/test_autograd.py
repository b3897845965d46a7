"""The ops within autograd: checkpoints, hooks, several backwards, function transforms."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastgrpo
from fastgrpo import LossConfig, checks
from fastgrpo.testing import make_batch

CALLS = {
    "log-probs": lambda b, h, w: fastgrpo.linear_logps(h, w, b.completion_ids).logps.sum(),
    "entropy": lambda b, h, w: fastgrpo.linear_logps(
        h, w, b.completion_ids, entropy="differentiable"
    ).entropy.sum(),
    "sparse, in the forward": lambda b, h, w: fastgrpo.linear_logps(
        h, w, b.completion_ids, sparsity=0.05, seed=1, old_logps=b.old_logps
    ).logps.sum(),
    "sparse, in a second pass": lambda b, h, w: fastgrpo.linear_logps(
        h, w, b.completion_ids, sparsity=0.05, seed=1
    ).logps.sum(),
    "loss": lambda b, h, w: fastgrpo.grpo_loss(h, w, *b[2:5], old_logps=b.old_logps).loss,
    "loss of two phases": lambda b, h, w: (
        fastgrpo.grpo_loss(h, w, *b[2:5], old_logps=b.old_logps, config="gspo").loss
    ),
    "sparse loss": lambda b, h, w: (
        fastgrpo.grpo_loss(h, w, *b[2:5], old_logps=b.old_logps, sparsity=0.05, seed=1).loss
    ),
    "differentiable entropy": lambda b, h, w: (
        fastgrpo.grpo_loss(h, w, *b[2:5], config=LossConfig(entropy="differentiable")).loss
    ),
}


def leaves(batch, frozen=False):
    hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
    return hidden, weight.requires_grad_(not frozen)


def gradients(call, batch, frozen, wrap):
    hidden, weight = leaves(batch, frozen)
    wrap(lambda h, w: call(batch, h, w), hidden, weight).backward()
    return hidden.grad, weight.grad


class FreedOnUnpack:
    """Saved tensors that are gone once they have been looked at, as an offload's buffers are."""

    def __init__(self):
        self.kept = {}

    def pack(self, x):
        self.kept[len(self.kept)] = x
        return len(self.kept) - 1

    def unpack(self, key):
        return self.kept.pop(key)


def hooked(call, hidden, weight):
    hooks = FreedOnUnpack()
    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack):
        return call(hidden, weight)


def checkpointed(call, hidden, weight):
    return checkpoint(call, hidden, weight, use_reentrant=False)


@pytest.mark.parametrize("wrap", [checkpointed, hooked])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_saved_tensors_are_unpacked_once(call, frozen, wrap):
    batch = make_batch()
    plain = gradients(call, batch, frozen, lambda f, h, w: f(h, w))
    for actual, wanted in zip(gradients(call, batch, frozen, wrap), plain, strict=True):
        assert (actual is None) == (wanted is None)
        assert wanted is None or torch.equal(actual, wanted)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_several_backwards_with_edits_in_between(call):
    batch = make_batch()
    once = gradients(call, batch, False, lambda f, h, w: f(h, w))
    hidden, weight = leaves(batch)
    value = call(batch, hidden, weight)
    for times in (1, 2, 3):
        value.backward(retain_graph=True)
        for leaf, gradient in zip((hidden, weight), once, strict=True):
            torch.testing.assert_close(leaf.grad, times * gradient)
    torch.nn.utils.clip_grad_norm_([hidden, weight], 1e-3)
    for leaf in (hidden, weight):
        leaf.grad.data.zero_()
    value.backward()
    for leaf, gradient in zip((hidden, weight), once, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_the_only_backward_hands_over_what_the_forward_made():
    batch = make_batch()
    hidden, weight = leaves(batch)
    out = fastgrpo.grpo_loss(hidden, weight, *batch[2:5])
    made = [x.data_ptr() for x in out.loss.grad_fn.saved_tensors]
    out.loss.backward()
    assert weight.grad.data_ptr() in made, "a second copy of dweight"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_forward_mode_is_refused(call):
    batch = make_batch()
    for i in range(2):
        operands = [x.clone() for x in batch[:2]]

        def function(x, i=i, operands=operands):
            return call(batch, *(x if j == i else y for j, y in enumerate(operands)))

        for transform in (
            lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
            lambda f, x: torch.func.jacfwd(f)(x),
        ):
            with pytest.raises(NotImplementedError, match="fastgrpo has no forward-mode"):
                transform(function, operands[i])


def test_compiled_with_numbers_that_change():
    """Floats become symbols under dynamic=True, and at their second value without it."""
    batch = make_batch()

    def step(hidden, weight, temperature, normalizer):
        return fastgrpo.grpo_loss(
            hidden, weight, *batch[2:5], old_logps=batch.old_logps, temperature=temperature,
            normalizer=normalizer,
        ).loss  # fmt: skip

    for dynamic in (True, None):
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for numbers in ((1.0, 3.0), (0.7, 5.0), (0.9, 8.5)):
            assert compiled(*leaves(batch), *numbers) == step(*leaves(batch), *numbers)
        torch.compiler.reset()


def test_checked_is_of_a_thread():
    """Two overlapping contexts in two threads, and what is left afterwards."""
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with fastgrpo.checked():
            inside.set()
            leave.wait(10)
        seen.append(checks._values_checked_on_gpu.get())

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with fastgrpo.checked():
        leave.set()
        thread.join()
        assert checks._values_checked_on_gpu.get()
    assert not checks._values_checked_on_gpu.get() and seen == [False]
