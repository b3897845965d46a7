"""The ops under `torch.library.opcheck` and `torch.compile(fullgraph=True)`."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig, ops
from fastgrpo.testing import make_batch

HEAD = (1.0, 0.0, None, "torch")  # logit_scale, softcap, workspace_mb, backend
NO_SUPPORT = (None, None)


def flat(batch):
    n = batch.completion_ids.numel()
    hidden = batch.hidden.reshape(n, -1).clone().requires_grad_()
    rows = [x.reshape(n) for x in batch[2:4]]
    advantages = batch.advantages[:, None].expand(batch.completion_ids.shape).reshape(n)
    sequences, length = batch.completion_ids.shape
    cu = torch.arange(sequences + 1) * length
    policy = (cu, advantages, *(x.reshape(n) for x in batch[5:]))
    return hidden, batch.weight.clone().requires_grad_(), rows, policy


@pytest.mark.parametrize("jacobian", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck_linear_logps(entropy, jacobian):
    hidden, weight, (ids, mask), _ = flat(make_batch())
    weight.requires_grad_(not jacobian)
    bias = torch.randn(len(weight), requires_grad=not jacobian)
    temperature = torch.rand(len(ids)) + 0.5
    operands = (hidden, weight, ids, mask, bias, None, temperature, *NO_SUPPORT, *HEAD)
    torch.library.opcheck(ops.linear_logps, (*operands, entropy, jacobian, 0.0, None, None))


def test_opcheck_lora():
    hidden, weight, (ids, mask), policy = flat(make_batch())
    hidden = torch.cat([hidden, torch.randn(len(ids), 2)], 1).detach().requires_grad_()
    lora = torch.randn(len(weight), 2, requires_grad=True)
    operands = (hidden, weight.detach(), ids, mask, None, lora, None, *NO_SUPPORT, *HEAD)
    torch.library.opcheck(ops.linear_logps, (*operands, True, False, 0.0, None, None))
    call = (*policy, None, None, None, None, LossConfig.preset("grpo").key)
    torch.library.opcheck(ops.grpo_loss, (*operands, *call, True, True, False, False, 0.0, None))


@pytest.mark.parametrize("drawn_in", ["forward", "backward"])
def test_opcheck_sparse_linear_logps(drawn_in):
    batch = make_batch()
    hidden, weight, (ids, mask), (_, _, old_logps, *_) = flat(batch)
    old_logps = old_logps if drawn_in == "forward" else None
    operands = (hidden, weight, ids, mask, None, None, None, *NO_SUPPORT, *HEAD)
    drawn = (0.01, torch.tensor(3), old_logps)
    torch.library.opcheck(ops.linear_logps, (*operands, True, False, *drawn))


OPTIONS = {
    "grpo": {"correction": "sequence_mis", "aggregation": "prompt_mean"},
    "gspo": {"top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.1},
}


@pytest.mark.parametrize("sparsity", [0.0, 0.01])
@pytest.mark.parametrize("preset", OPTIONS)
def test_opcheck_grpo_loss(preset, sparsity):
    seed = torch.tensor(3) if sparsity else None
    hidden, weight, (ids, mask), policy = flat(make_batch())
    config = LossConfig.preset(preset, beta=0.1, entropy_coef=0.1, **OPTIONS[preset])
    groups, threshold, normalizer = torch.arange(4) % 2, torch.tensor(1.0), torch.tensor(3.0)
    torch.library.opcheck(
        ops.grpo_loss,
        (hidden, weight, ids, mask, None, None, None, *NO_SUPPORT, *HEAD)
        + (*policy, groups, threshold, normalizer, None, config.key)
        + (True, True, False, False, sparsity, seed),
    )


def test_opcheck_policy_loss():
    _, _, (ids, mask), policy = flat(make_batch())
    logps = torch.randn(len(ids), requires_grad=True)
    entropy = torch.rand(len(ids), requires_grad=True)
    key = LossConfig.preset("gspo", beta=0.1, entropy_coef=0.1).key
    torch.library.opcheck(
        ops.policy_loss,
        (logps, entropy, mask, *policy, None, None, None, None, key, "torch"),
    )


@pytest.mark.parametrize("backend_of_compile", ["aot_eager", "inductor"])
@pytest.mark.parametrize("entropy", ["none", "differentiable"])
@pytest.mark.parametrize("preset", ["grpo", "gspo"])
def test_compiled_equals_eager(preset, entropy, backend_of_compile, monkeypatch, tmp_path):
    # The user's cache would serve shapes that an op had before it was edited.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if backend_of_compile == "inductor" and (preset, entropy) != ("grpo", "none"):
        pytest.skip("one round trip through the C++ compiler is enough")
    batch = make_batch()
    correction = {"correction": "icepop"} if preset == "grpo" else {}
    config = LossConfig.preset(preset, beta=0.1, entropy=entropy, entropy_coef=0.1, **correction)

    def step(hidden, weight, ids, mask, advantages, old, ref, sampler, temperature):
        out = fastgrpo.grpo_loss(
            hidden.tanh(), weight, ids, mask, advantages,
            old_logps=old, ref_logps=ref, sampler_logps=sampler, temperature=temperature,
            config=config,
        )  # fmt: skip
        return out.loss * 2, out.logps, out.metrics["kl"]

    compiled = torch.compile(step, fullgraph=True, backend=backend_of_compile)
    results = []
    for function in (compiled, step):  # an eager call must not have to come first
        hidden, weight = (x.clone().requires_grad_() for x in batch[:2])
        outputs = function(hidden, weight, *batch[2:], 0.8)
        results.append((*outputs, *torch.autograd.grad(outputs[0], (hidden, weight))))
    for traced, eager in zip(*results, strict=True):
        assert torch.allclose(eager, traced, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sparsity", [False, True])
def test_compiled_preset_by_name_and_log_probs(sparsity):
    batch = make_batch()

    sparse = {"sparsity": 0.05, "seed": 3} if sparsity else {}

    def step(hidden, weight):
        logps = fastgrpo.linear_logps(hidden, weight, batch.completion_ids, **sparse).logps
        loss = fastgrpo.grpo_loss(hidden, weight, *batch[2:5], config="dapo", **sparse).loss
        return logps.sum() + loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    hidden = batch.hidden.requires_grad_()
    (eager,) = torch.autograd.grad(step(*batch[:2]), hidden)
    (traced,) = torch.autograd.grad(compiled(*batch[:2]), hidden)
    assert torch.allclose(eager, traced, rtol=1e-6)
