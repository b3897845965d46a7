"""The GRPO loss, forward and backward: dense, with a frozen head, with rows that carry nothing."""

import pytest

from benchmarks.timing import synced_clock


@pytest.mark.benchmark(timer=synced_clock)
@pytest.mark.parametrize("mode", ["loss", "frozen", "half_zero", "rl"], scope="session")
def test_grpo_loss(measure, provider, mode, shape, dtype):
    measure(provider, mode, shape, dtype)
