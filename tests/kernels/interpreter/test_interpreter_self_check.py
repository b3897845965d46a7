"""The self-check of real kernels, interpreted: it passes, and finds what is planted."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
import fastgrpo_kernels
from fastgrpo.dispatch import choice, self_check
from fastgrpo.testing import make_batch

BATCH = make_batch(sequences=3, length=5, hidden_size=64, vocab=53, dtype=torch.bfloat16)


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """Interpreted kernels pass for compiled ones, on a problem of their size."""
    for name, size in dict(ROWS=24, VOCAB=601, HIDDEN=64).items():
        monkeypatch.setattr(self_check, name, size)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "INTERPRETED", False)
    monkeypatch.setattr(choice, "_verdicts", {})


def loss(backend="auto", **options):
    batch = BATCH._replace(
        hidden=BATCH.hidden.clone().requires_grad_(), weight=BATCH.weight.clone().requires_grad_()
    )
    out = fastgrpo.grpo_loss(*batch[:5], old_logps=batch.old_logps, backend=backend, **options)
    out.loss.backward()
    return out.loss.detach(), batch.hidden.grad, batch.weight.grad


@pytest.mark.parametrize("sparsity", [0.0, 0.05], ids=["dense", "sparse"])
def test_the_kernels_pass_and_run(on_a_gpu, monkeypatch, recwarn, sparsity):
    options = dict(sparsity=sparsity, seed=0) if sparsity else {}
    used = []
    linear = fastgrpo_kernels.token_loss
    monkeypatch.setattr(
        fastgrpo_kernels, "token_loss", lambda *a, **k: used.append(1) or linear(*a, **k)
    )
    loss(**options)
    assert [str(w.message) for w in recwarn if "fastgrpo" in str(w.message)] == []
    assert list(choice._verdicts.values()) == [choice.Verdict()]
    assert len(used) > 1, "in the check, and in the loss"


def off(function, change):
    """The function, with its results or its buffers changed after it has run."""

    def planted(*arguments, **options):
        result = function(*arguments, **options)
        return change(result, arguments)

    return planted


PLANTED = {
    "anchored_logps_fwd": (
        "logps off by",
        lambda result, _: result._replace(
            scored=result.scored._replace(logps=result.scored.logps + 1e-3)
        ),
    ),
    "tile_grad": ("dhidden in the backward off by", lambda _, given: given[3].mul_(1.01)),
    "bag_sum": ("dweight sparse off by", lambda _, given: given[0].mul_(1.1)),
    "segment_reduce": ("segment_reduce off by", lambda result, _: result * 1.001),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_found_and_torch_runs_instead(on_a_gpu, monkeypatch, name):
    figure, change = PLANTED[name]
    options = dict(sparsity=0.05, seed=0) if name == "bag_sum" else {}
    expected = loss("torch", **options)
    monkeypatch.setattr(fastgrpo_kernels, name, off(getattr(fastgrpo_kernels, name), change))
    with pytest.warns(RuntimeWarning, match=figure):
        actual = loss(**options)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with pytest.raises(RuntimeError, match=figure):
        loss("triton", **options)
