"""Samples are interleaved and paired; the bound times the products that it names."""

import time

import pytest
import torch

from benchmarks.batches import make_batch
from benchmarks.peak_memory import allocated_peak_mib, resident_peak_mib
from benchmarks.shapes import Shape
from benchmarks.timing import GemmBound, interleave, summary

CPU = torch.device("cpu")


def test_rounds_are_rotated_and_a_failure_is_recorded():
    order = []

    def fails():
        raise MemoryError("too large")

    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": fails}
    samples, failures = interleave(calls, device=CPU, rounds=3, seconds=60)
    assert "".join(order) == "ab" + "ba" + "ab"
    assert {name: len(done) for name, done in samples.items()} == {"a": 3, "b": 3}
    assert failures == {"c": "MemoryError: too large"}


def test_a_slow_call_is_sampled_once_and_time_is_kept():
    calls = {"fast": lambda: None, "slow": lambda: time.sleep(0.02)}
    samples, _ = interleave(calls, device=CPU, rounds=4, seconds=60, slow_ms=10)
    assert len(samples["fast"]) == 4 and len(samples["slow"]) == 1
    samples, _ = interleave(calls, device=CPU, rounds=1000, seconds=0.1)
    assert 1 <= len(samples["slow"]) <= 5


def test_share_is_the_median_of_paired_ratios():
    result = summary([2.0, 20.0, 4.0], bound=[1.0, 10.0, 3.0])
    assert result["median_ms"] == 4.0 and result["share_of_bound"] == 0.5
    assert result["p10_ms"] < result["median_ms"] < result["p90_ms"]


@pytest.mark.parametrize("gemms", [1, 2, 3])
def test_bound_is_the_products_in_blocks(gemms):
    batch = make_batch(Shape("test", 40, 31, 8, sequences=4), torch.float32, "loss", CPU)
    bound = GemmBound(batch, gemms, torch.float32, block=16)
    bound()
    hidden = batch.hidden.detach().flatten(0, 1)
    logits = hidden @ batch.weight.detach().T
    torch.testing.assert_close(bound.logits[:8], logits[32:])  # the last block has 8 rows
    assert bound.flop == 2 * 40 * 31 * 8 * gemms
    if gemms > 1:
        torch.testing.assert_close(bound.dhidden, logits @ batch.weight.detach())
    if gemms > 2:
        torch.testing.assert_close(bound.dweight, logits.T @ hidden, rtol=1e-4, atol=1e-4)


def test_allocated_peak_sees_what_was_freed():
    def call():
        large = torch.ones(4 << 20)  # 16 MiB
        return (large + 1).sum()  # 16 MiB more

    assert allocated_peak_mib(call, CPU) == pytest.approx(32, abs=1)


def test_resident_peak_of_plain_logits_is_its_logits():
    shape = Shape("test", 1024, 8192, 16)
    peak = resident_peak_mib("plain logits", "logps", shape, torch.float32, timeout=120)
    # Logits and log-probs, 32 MiB each.
    assert peak == pytest.approx(64, abs=8)


def test_resident_peak_names_the_provider_that_failed():
    with pytest.raises(ChildProcessError, match="QuACK"):
        resident_peak_mib("QuACK", "loss", Shape("test", 8, 8, 8), torch.float32, timeout=120)
