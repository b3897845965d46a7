"""Runs of trainers of others, with the adapters and without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def one_thread():
    """Models as small as these only wait for more."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer on disk: TRL loads its reference from there."""
    from trl_runs import save_tiny_model  # TRL may be missing

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["all rows", "rows with a label"])
def compact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """TRL scores every position on devices without Triton, and those with a label elsewhere."""
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: request.param)
    return request.param
