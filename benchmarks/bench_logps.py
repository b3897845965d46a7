"""Log-probs of given tokens: without a gradient, and with any upstream gradient."""

import pytest

from benchmarks.timing import synced_clock


@pytest.mark.benchmark(timer=synced_clock)
@pytest.mark.parametrize("mode", ["logps", "token_logps"], scope="session")
def test_token_logps(measure, provider, mode, shape, dtype):
    measure(provider, mode, shape, dtype)
