"""The GRPO loss over the ids that a sampler kept, beside full logits whose other ids are masked."""

import pytest

from benchmarks.measure import SUPPORT_MODES
from benchmarks.timing import synced_clock


@pytest.mark.benchmark(timer=synced_clock)
@pytest.mark.parametrize("name", ["plain logits", "fastgrpo torch"])
@pytest.mark.parametrize("mode", SUPPORT_MODES, scope="session")
def test_support(measure, name, mode, shape, dtype):
    measure(name, mode, shape, dtype)
