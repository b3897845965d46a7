"""Tests that need a GPU. Without one nothing here is collected."""

from __future__ import annotations

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def kernels_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What says backend="auto" runs on the kernels: torch in their place would pass unseen."""
    monkeypatch.setenv("FASTGRPO_BACKEND", "triton")
