"""Shared by tests of the public functions: inputs, float64 results, error bars."""

from __future__ import annotations

import torch

import fastgrpo
from fastgrpo import LossConfig, reference
from fastgrpo.testing import LargestTensor, LiveBytes, make_batch

# ---- losses ------------------------------------------------------------------------------------

# One of each shape that a loss takes on its way through the ops; tests/test_loss_family.py has all.
PRESETS = ("reinforce", "grpo", "dapo", "dr_grpo", "cispo", "gspo", "gmpo", "prime_dppo")


def config_of(preset, **options):
    if preset == "dr_grpo":
        options["max_completion_length"] = 9
    return LossConfig.preset(preset, **options)


def valid_batch(**options):
    """A batch whose log-probs are all below 0: some losses look at probabilities."""
    batch = make_batch(**options)
    return type(batch)(*batch[:5], *(x.clamp(max=-1e-4) for x in batch[5:]))


def exact(batch, config, *, on_policy=False, normalizer=None, groups=None, **head):
    """Loss and gradients of hidden and weight in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in batch[:2])
    logps, entropy, _ = reference.token_logps(hidden, weight, batch.completion_ids, **head)
    loss = reference.policy_loss(
        logps,
        entropy,
        batch.completion_mask,
        batch.advantages.double(),
        config,
        old_logps=None if on_policy else batch.old_logps.double(),
        ref_logps=batch.ref_logps.double(),
        sampler_logps=batch.sampler_logps.double(),
        normalizer=normalizer,
        groups=groups,
    )
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def fused(batch, config, *, on_policy=False, frozen=False, **options):
    """The same from `grpo_loss`, and its whole result."""
    hidden = batch.hidden.detach().requires_grad_()
    weight = batch.weight.detach().requires_grad_(not frozen)
    options = {"sampler_logps": batch.sampler_logps, **options}
    out = fastgrpo.grpo_loss(
        hidden,
        weight,
        batch.completion_ids,
        batch.completion_mask,
        batch.advantages,
        old_logps=None if on_policy else batch.old_logps,
        ref_logps=batch.ref_logps,
        config=config,
        **options,
    )
    out.loss.backward()
    return out, hidden.grad, weight.grad


# ---- log-probs ---------------------------------------------------------------------------------

TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperature per token": {"temperature": "per token"},
    "bias": {"bias": True},
    "scale and softcap": {"logit_scale": 0.5, "softcap": 4.0},
    "all": {"bias": True, "temperature": "per token", "logit_scale": 1.5, "softcap": 9.0},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Rounding a gradient to its own dtype costs 1.7e-3 in bf16 and 2.1e-4 in fp16.
GRADIENT_BARS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def operands(dtype=torch.float32, transform="plain", **shape):
    batch = make_batch(dtype=dtype, **shape)
    options = dict(TRANSFORMS[transform])
    g = torch.Generator().manual_seed(1)
    if options.get("bias"):
        options["bias"] = torch.randn(batch.weight.shape[0], generator=g).to(dtype)
    if options.get("temperature") == "per token":
        options["temperature"] = torch.rand(batch.completion_ids.shape, generator=g) + 0.5
    return batch.hidden, batch.weight, batch.completion_ids, options


def exact_logps(hidden, weight, ids, options, upstream, upstream_entropy=None):
    """logps, entropy, lse and the gradients of hidden, weight and bias in float64."""
    leaves = {"hidden": hidden, "weight": weight}
    if "bias" in options:
        leaves["bias"] = options["bias"]
    leaves = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    options = {
        k: v.double() if isinstance(v, torch.Tensor) and v.dtype != torch.bool else v
        for k, v in options.items()
    } | {k: v for k, v in leaves.items() if k == "bias"}
    logps, entropy, lse = reference.token_logps(leaves["hidden"], leaves["weight"], ids, **options)
    total = (logps * upstream).sum()
    if upstream_entropy is not None:
        total = total + (entropy * upstream_entropy).sum()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return logps.detach(), entropy.detach(), lse.detach(), dict(zip(leaves, grads, strict=True))


# ---- the sparse backward -----------------------------------------------------------------------

SEEDS = 32
HEADS = {
    "plain": {},
    "scaled": {"temperature": 0.7, "logit_scale": 1.2, "softcap": 12.0},
    "biased": {"bias": torch.linspace(-1, 1, 301)},
}
SHAPE = dict(sequences=6, length=11, vocab=301, hidden_size=16, logit_std=2.0, off_policy=0.1)


def gradients(batch, frozen=False, **options):
    hidden = batch.hidden.clone().requires_grad_()
    weight = batch.weight.clone().requires_grad_(not frozen)
    options = {"old_logps": batch.old_logps, "ref_logps": batch.ref_logps, **options}
    out = fastgrpo.grpo_loss(
        hidden, weight, *batch[2:5], sampler_logps=batch.sampler_logps, **options
    )
    out.loss.backward()
    return out, *(x.grad for x in (hidden, weight) if x.grad is not None)


def assert_unbiased(samples, exact):
    """|mean error|^2 is what independent errors without a bias give, within four sigma of chance.

    With R samples, a bias b and a noise of rms s, `excess` is 1 + R b^2 / s^2, but for chance:
    sqrt(2 / d), d being the dimensions that the noise fills.
    """
    errors = torch.stack([(x.double() - exact.double()).flatten() for x in samples])
    assert errors.any()
    excess = len(errors) * errors.mean(0).square().sum() / errors.square().sum(1).mean()
    gram = errors @ errors.t()
    dimensions = gram.trace().square() / gram.square().sum()
    assert excess < 1 + 4 * (2 / dimensions).sqrt(), f"{excess}, {dimensions} dimensions"


# ---- memory ------------------------------------------------------------------------------------


def largest_inside(op, call, monkeypatch):
    """The largest tensor, in bytes, that the implementation of a custom op makes in `call`."""
    seen = LargestTensor()
    observe(op, call, monkeypatch, lambda given: seen)
    assert seen.bytes > 0, "the implementation was not observed"
    return seen.bytes


def live_inside(op, call, monkeypatch):
    """The most bytes that live at once inside a custom op in `call`, less those of its results."""
    modes = []

    def begin(given):
        modes.append(LiveBytes(given))
        return modes[0]

    results = observe(op, call, monkeypatch, begin)
    assert modes[0].peak > 0, "the implementation was not observed"
    return modes[0].peak - sum(x.untyped_storage().nbytes() for x in results)


def observe(op, call, monkeypatch, begin):
    """Run `call` with the mode that `begin` returns inside an op, and return the op's results.

    A dispatch mode around it sees an op as a whole.
    """
    undecorated, results = op._init_fn, []

    def observed(*args):
        with begin(args):
            results[:] = undecorated(*args)
        return tuple(results)

    with monkeypatch.context() as patch:
        for device, kernel in list(op._backend_fns.items()):
            assert kernel is not None
            patch.setitem(op._backend_fns, device, observed)
        call()
    return results
