"""Tests that need a GPU. Without one only rows of the fault matrix are collected, and skipped."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*on_a_gpu.py"]


@pytest.fixture(autouse=True)
def kernels_or_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What says backend="auto" runs on the best kernels: others in their place would pass unseen.

    These tests see more than the check at first use, whose verdict must not keep them from it.
    """
    monkeypatch.setenv("FASTGRPO_BACKEND", "triton")
    monkeypatch.setenv("FASTGRPO_SELF_CHECK", "0")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fastgrpo", RuntimeWarning)
        yield
