"""The GRPO loss and its gradients: dense, frozen head, rows that carry nothing, a policy's rows."""

import pytest

from benchmarks.timing import synced_clock


@pytest.mark.benchmark(timer=synced_clock)
@pytest.mark.parametrize("mode", ["loss", "frozen", "half_zero", "rl", "policy"], scope="session")
def test_grpo_loss(measure, provider, mode, shape, dtype):
    measure(provider, mode, shape, dtype)
