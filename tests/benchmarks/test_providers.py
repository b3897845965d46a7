"""Every provider computes the oracle's loss, and a wrong one is caught."""

import dataclasses

import pytest
import torch

from benchmarks.batches import make_batch
from benchmarks.cases import distances
from benchmarks.data import CLIPPED
from benchmarks.measure import (
    MODES,
    SUPPORT_MODES,
    Errors,
    check,
    errors,
    oracle,
    run,
    sampling_noise,
)
from benchmarks.providers import LOADERS, Provider, load, plain_logits
from benchmarks.record import CPU_PROVIDERS
from benchmarks.shapes import Shape

# Prime vocabulary, an odd hidden size, completions of 11 tokens.
SHAPE = Shape("test", 44, 257, 33, sequences=4)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*CPU_PROVIDERS, "Liger scaled CE"])
def test_provider_agrees_with_the_oracle(name, mode, dtype):
    available, missing = load((name,))
    if missing:
        pytest.skip(missing[name])
    batch = make_batch(SHAPE, dtype, mode, CPU)
    found = distances(available[0], mode, batch, oracle(mode, batch))
    check(available[0], found, dtype)
    if available[0].sparsity and mode != "logps":
        # A draw scatters about its root mean square error; its rounding comes on top.
        for error, noise in (
            (found.dhidden, found.dhidden_noise),
            (found.dweight, found.dweight_noise),
        ):
            assert error is None or 0.7 * noise < error < 1.4 * noise + 4e-3


@pytest.mark.parametrize("mode", SUPPORT_MODES)
@pytest.mark.parametrize("name", ["plain logits", "fastgrpo torch"])
def test_a_support_agrees_with_the_oracle(name, mode):
    (provider,), _ = load((name,))
    batch = make_batch(SHAPE, torch.float32, mode, CPU)
    exact = oracle(mode, batch, block=11)  # of one completion
    check(provider, distances(provider, mode, batch, exact), torch.float32)
    dense = oracle("loss", dataclasses.replace(batch, support=None))
    assert errors(exact, dense, batch.completion_mask).dhidden > 0.1


def test_a_provider_without_supports_says_so():
    (provider,), _ = load(("fastgrpo sparse",))
    batch = make_batch(SHAPE, torch.float32, "support_12", CPU)
    with pytest.raises(ValueError, match="support: fastgrpo sparse has none"):
        run(provider, "loss", batch)


def test_noise_is_the_root_mean_square_error_over_seeds():
    import fastgrpo

    batch = make_batch(SHAPE, torch.float32, "token_logps", CPU)
    exact = oracle("token_logps", batch)
    upstream = batch.old_logps / batch.old_logps.numel()
    squares = []
    for seed in range(40):
        batch.hidden.grad = batch.weight.grad = None
        fastgrpo.linear_logps(
            batch.hidden, batch.weight, batch.completion_ids,
            sparsity=0.02, seed=seed, old_logps=batch.old_logps,
        ).logps.backward(upstream)  # fmt: skip
        distance = (
            (batch.hidden.grad - exact.dhidden).norm() / exact.dhidden.norm(),
            (batch.weight.grad - exact.dweight).norm() / exact.dweight.norm(),
        )
        squares.append([d.item() ** 2 for d in distance])
    noise = sampling_noise("token_logps", batch, exact, 0.02)
    rms = torch.tensor(squares).mean(0).sqrt().tolist()
    assert rms == pytest.approx([noise.dhidden_noise, noise.dweight_noise], rel=0.05)


def test_oracle_equals_the_reference():
    from fastgrpo import LossConfig, reference

    batch = make_batch(SHAPE, torch.float64, "rl", CPU)
    exact = oracle("rl", batch)
    logps, entropy, _ = reference.token_logps(batch.hidden, batch.weight, batch.completion_ids)
    config = LossConfig.preset("dapo", epsilon_high=0.2)
    loss = reference.policy_loss(
        logps,
        entropy,
        batch.completion_mask,
        batch.advantages.double(),
        config,
        old_logps=batch.old_logps.double(),
    )
    batch.hidden.grad = batch.weight.grad = None
    loss.backward()
    torch.testing.assert_close(loss, exact.loss)
    torch.testing.assert_close(batch.hidden.grad, exact.dhidden)
    torch.testing.assert_close(batch.weight.grad, exact.dweight)


def test_random_batch_clips_its_share_and_skips_nothing_else():
    batch = make_batch(SHAPE, torch.float32, "loss", CPU)
    exact = oracle("loss", batch)
    ratio = (exact.logps - batch.old_logps).exp()
    clipped = (ratio < 0.75) | (ratio > 1.25)
    assert clipped.sum() == round(CLIPPED * SHAPE.rows) > 0
    assert ratio[~clipped].min() > 0.85 and ratio[~clipped].max() < 1.15
    assert torch.equal(exact.dhidden.norm(dim=-1) > 0, ~clipped)
    assert exact.logps.max() > -0.1 and exact.logps.min() < -5  # peaked rows and flat ones


def test_rl_batch_has_the_shares_it_is_asked_for():
    batch = make_batch(Shape("test", 800, 61, 8, sequences=8), torch.float32, "rl", CPU)
    assert (batch.advantages == 0).float().mean() == MODES["rl"].zero_advantage
    padding = 1 - batch.completion_mask.float().mean()
    assert padding.item() == pytest.approx(MODES["rl"].padding, abs=0.02)


plain = plain_logits()


@pytest.mark.parametrize(
    "wrong, mode",
    [
        # The log-probs of a temperature nobody asked for.
        (lambda b: plain.token_logps(dataclasses.replace(b, hidden=b.hidden * 1.02)), "logps"),
        # The right values with half of the gradient.
        (lambda b: (plain.token_logps(b) + plain.token_logps(b).detach()) / 2, "token_logps"),
        (lambda b: plain.token_logps(b) * float("nan"), "logps"),
    ],
    ids=["temperature", "gradient", "nan"],
)
def test_check_catches_a_wrong_provider(wrong, mode):
    batch = make_batch(SHAPE, torch.float32, mode, CPU)
    found = errors(run(Provider("wrong", wrong), mode, batch), oracle(mode, batch), True)
    with pytest.raises(AssertionError, match="wrong: .* error"):
        check(Provider("wrong", wrong), found, torch.float32)


def test_own_bars_are_the_stricter_ones():
    batch = make_batch(SHAPE, torch.bfloat16, "logps", CPU)
    found = errors(run(plain, "logps", batch), oracle("logps", batch), batch.completion_mask)
    check(plain, found, torch.bfloat16)
    with pytest.raises(AssertionError, match="fastgrpo"):
        check(plain._replace(name="fastgrpo"), found, torch.bfloat16)


def test_an_estimate_may_miss_by_its_noise_and_no_more():
    sparse = plain._replace(name="fastgrpo sparse", sparsity=1e-3)
    found = Errors(dhidden=0.02, dweight=0.02, dhidden_noise=0.01, dweight_noise=0.01)
    check(sparse, found, torch.float32)
    with pytest.raises(AssertionError, match="dweight error"):
        check(sparse, found._replace(dweight=0.04), torch.float32)
    with pytest.raises(AssertionError, match="dhidden error"):
        check(sparse, found._replace(dhidden_noise=None), torch.float32)


def test_missing_provider_is_named(monkeypatch):
    def broken():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setitem(LOADERS, "broken", broken)
    available, missing = load(("plain logits", "broken"))
    assert [provider.name for provider in available] == ["plain logits"]
    assert missing == {"broken": "OSError: libcuda.so.1: cannot open shared object file"}
