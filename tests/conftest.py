"""Shared by all tests: the backends that can run in this process, and poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastgrpo_kernels.runtime import INTERPRETED

pytest.register_assert_rewrite(
    "loss_routes", "oracle", "row_oracle", "score_oracle", "support_oracle"
)
BACKENDS = ["triton"] if INTERPRETED else ["torch"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on a CPU here: "triton" only in a process with TRITON_INTERPRET=1."""
    return request.param


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Whatever is read before it was written shows up as NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
