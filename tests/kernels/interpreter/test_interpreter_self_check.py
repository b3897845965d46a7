"""The self-check of real kernels, interpreted: it passes, and finds what is planted."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
import fastgrpo_kernels
from fastgrpo.dispatch import choice, self_check
from fastgrpo.testing import make_batch
from fastgrpo_kernels.runtime import LaunchError
from support_oracle import kept_masks, support_of

BATCH = make_batch(sequences=3, length=5, hidden_size=64, vocab=53, dtype=torch.bfloat16)
OPTIONS = {
    "dense": {},
    "sparse": dict(sparsity=0.05, seed=0),
    "support": dict(support=support_of(kept_masks(BATCH.completion_ids, 53), BATCH.completion_ids)),
}


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


@pytest.mark.parametrize("mode", OPTIONS)
def test_the_kernels_pass_and_run(on_a_gpu, monkeypatch, recwarn, mode):
    used = []
    linear = fastgrpo_kernels.token_loss
    monkeypatch.setattr(
        fastgrpo_kernels, "token_loss", lambda *a, **k: used.append(1) or linear(*a, **k)
    )
    loss(**OPTIONS[mode])
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
    "segment_softmax": (
        "support lse off by",
        lambda result, _: result._replace(lse=result.lse + 1e-3),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_found_and_torch_runs_instead(on_a_gpu, monkeypatch, name):
    figure, change = PLANTED[name]
    options = OPTIONS[{"bag_sum": "sparse", "segment_softmax": "support"}.get(name, "dense")]
    expected = loss("torch", **options)
    monkeypatch.setattr(fastgrpo_kernels, name, off(getattr(fastgrpo_kernels, name), change))
    with pytest.warns(RuntimeWarning, match=figure):
        actual = loss(**options)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    with pytest.raises(RuntimeError, match=figure):
        loss("triton", **options)


REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.5])
LOGPS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
SEEN = torch.arange(6) < torch.tensor([6, 3, 4, 1])[:, None]


def log_probs(backend="auto"):
    hidden, weight = (x.clone().requires_grad_() for x in (BATCH.hidden, BATCH.weight))
    out = fastgrpo.linear_logps(hidden, weight, BATCH.completion_ids, backend=backend)
    out.logps.sum().backward()
    return out.logps.detach(), hidden.grad, weight.grad


ENTROPY = fastgrpo.LossConfig(entropy="differentiable", entropy_coef=0.1)
# Launchers that cannot launch, each with calls that take it.
CALLS = {
    "token_loss": [loss],
    "tile_grad": [loss],
    "tile_stats": [loss],
    "bag_sum": [lambda backend="auto": loss(backend, **OPTIONS["sparse"])],
    "entry_grads": [
        lambda backend="auto": loss(backend, **OPTIONS["sparse"]),
        lambda backend="auto": loss(backend, **OPTIONS["support"]),
    ],
    "segment_reduce": [
        lambda backend="auto": loss(backend, config="gspo"),
        lambda: [fastgrpo.rejection_mask(
            LOGPS, LOGPS.flip(0), SEEN, rejection="seq_mean_k1", rejection_max=1.1
        )],
    ],
    "group_stats": [
        lambda: [fastgrpo.group_advantages(REWARDS, 2)],
        lambda: [fastgrpo.length_penalty(REWARDS, SEEN.sum(1), 2, weight=0.1)],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_launched_is_done_by_torch_whole(on_a_gpu, monkeypatch, name):
    """From the start, though some kernels had run: bit for bit what torch alone gives."""
    monkeypatch.setenv("FASTGRPO_SELF_CHECK", "0")
    refused = []

    def refuse(*arguments, **options):
        refused.append(name)
        raise LaunchError(f"_{name}_kernel cannot be launched: out of resource")

    for call in CALLS[name]:
        monkeypatch.setenv("FASTGRPO_BACKEND", "torch")
        expected = call()
        monkeypatch.setenv("FASTGRPO_BACKEND", "auto")
        monkeypatch.setattr(choice, "_verdicts", {})
        refused.clear()
        with monkeypatch.context() as patched:
            patched.setattr(fastgrpo_kernels, name, refuse)
            with pytest.warns(RuntimeWarning, match=f"{name}_kernel cannot be launched"):
                actual = call()
        assert refused
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name, call", [
    ("tile_grad", log_probs), ("token_loss", lambda backend="auto": loss(backend, config=ENTROPY)),
], ids=["a backward", "a second op"])  # fmt: skip
def test_a_later_op_goes_on_from_what_the_kernels_gave(on_a_gpu, monkeypatch, name, call):
    monkeypatch.setenv("FASTGRPO_SELF_CHECK", "0")

    def refuse(*arguments, **options):
        raise LaunchError(f"_{name}_kernel cannot be launched: out of resource")

    expected = call("torch")
    monkeypatch.setattr(fastgrpo_kernels, name, refuse)
    with pytest.warns(RuntimeWarning, match=f"{name}_kernel cannot be launched"):
        actual = call()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
