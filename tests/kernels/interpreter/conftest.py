"""These tests need a process in which Triton interprets: TRITON_INTERPRET=1 from the start."""

import pytest
import torch

from fastgrpo_kernels.runtime import INTERPRETED

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def empty_is_nan(monkeypatch):
    """What a kernel should have written and did not is NaN, whatever the allocator returned."""

    def poisoned(function):
        def fill(*args, **kwargs):
            result = function(*args, **kwargs)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        return fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
