"""`grpo_loss` beside the trainers whose losses it implements."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastgrpo
from fastgrpo import LossConfig
from fastgrpo.testing import Batch, make_batch, relative_error
from padded_rollout import Rollout

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(autouse=True)
def one_thread():
    """Models as small as these only wait for more."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def rollout() -> Batch:
    """Eight completions, one of them empty; advantages of both signs; a third of ratios clipped."""
    batch = make_batch(sequences=8, length=9, off_policy=0.4)
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    below_one = [x.clamp(max=-1e-3) for x in batch[5:]]
    return Batch(*batch[:4], batch.advantages.abs() * signs, *below_one)


@pytest.fixture
def far(rollout: Batch) -> Batch:
    """Ratios up to some 20, and log-ratios of 30 nats."""
    old = rollout.old_logps + 3 * (rollout.ref_logps - rollout.old_logps)
    old[0, 0] -= 30
    old[1, 0] += 30
    return rollout._replace(old_logps=old)


@pytest.fixture
def corrected(rollout: Batch) -> Callable[[str], tuple[Batch, tuple[float, float], dict]]:
    """corrected(kind): with a sampler some way off, bounds that some are beyond, the options."""

    def corrected(kind: str) -> tuple[Batch, tuple[float, float], dict]:
        gap = (rollout.sampler_logps - rollout.old_logps).nan_to_num(nan=0.0)
        batch = rollout._replace(sampler_logps=rollout.old_logps + 3 * gap)
        name = {"tis": "token_tis", "icepop": "icepop", "seq-mask-tis": "seq_mask_tis"}[kind]
        bounds = (0.98, 1.02) if kind == "seq-mask-tis" else (0.9, 1.1)
        options = {"correction": name, "correction_min": bounds[0], "correction_max": bounds[1]}
        return batch, bounds, options

    return corrected


@pytest.fixture(params=(torch.float32, torch.float64), ids=("float32", "float64"))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def setting(dtype):
    """Tied embeddings, left-padded prompts; a completion with a tool's tokens, an empty one, one
    with a token that the sampler could not score.
    """
    from trl_source import make_setting  # TRL may be missing

    return make_setting(dtype)


@pytest.fixture
def equal(rollout: Batch) -> Callable[..., fastgrpo.GRPOLoss]:
    """equal(loss, config): is what loss(Rollout) computes what grpo_loss does, to 1e-9?"""

    def equal(
        loss: Callable[[Rollout], Tensor],
        config: str | LossConfig,
        *,
        batch: Batch = rollout,
        on_policy: bool = False,
        **options: object,
    ) -> fastgrpo.GRPOLoss:
        source = Rollout(batch)
        wanted = loss(source)
        gradients = torch.autograd.grad(wanted, (source.hidden, source.weight))
        hidden = batch.hidden.double().requires_grad_()
        weight = batch.weight.double().requires_grad_()
        out = fastgrpo.grpo_loss(
            hidden,
            weight,
            *batch[2:5],
            old_logps=None if on_policy else batch.old_logps,
            ref_logps=batch.ref_logps,
            sampler_logps=batch.sampler_logps,
            config=config,
            **options,
        )
        out.loss.backward()
        assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-9)
        for actual, gradient in zip((hidden.grad, weight.grad), gradients, strict=True):
            assert gradient.norm() > 0
            assert relative_error(actual, gradient) <= 1e-9
        return out

    return equal
