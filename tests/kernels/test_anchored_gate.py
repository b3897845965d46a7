"""Which variant of the anchored kernel runs, by the launch table and a trial; without a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastgrpo_kernels import anchored_logps
from fastgrpo_kernels.anchored_logps import refusal
from fastgrpo_kernels.runtime import ANCHORED_SMALL_H, LAUNCHES

FLATTENED = LAUNCHES["anchored_logps"][16, "sm_90"]
SPECIALISED = LAUNCHES["anchored_logps_small_h"][16, "sm_90"]
SUMS = torch.tensor([[1.0, 2e-30]])
ENGAGED = "... ttg.warp_specialize(...) ..."


def trial(specialised):
    """A trial whose specialised entry gives these results."""

    def run(launch):
        if launch is FLATTENED:
            return SUMS, "..."
        if isinstance(specialised, Exception):
            raise specialised
        return specialised

    return run


def test_a_trial_that_agrees_is_not_refused():
    assert refusal(trial((SUMS * (1 + 1e-6), ENGAGED)), SPECIALISED, FLATTENED) == ""


REFUSED = {
    "the compiler ignored it": (SUMS, "..."),
    "its sums are wrong": (SUMS * 1.001, ENGAGED),
    "its sums are wrong ": (SUMS * torch.nan, ENGAGED),
    "RuntimeError: PassManager::run failed": RuntimeError("PassManager::run failed"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_why_it_is_refused(reason):
    assert reason.strip() in refusal(trial(REFUSED[reason]), SPECIALISED, FLATTENED)


@pytest.fixture
def hopper(monkeypatch):
    """Launches as on sm_90, with a trial that counts and can be told to fail."""
    calls, engaged = [], [ENGAGED]

    def run(launch, device):
        calls.append(launch)
        return SUMS, engaged[0]

    monkeypatch.setattr(anchored_logps, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(anchored_logps, "_trial", run)
    monkeypatch.setattr(anchored_logps, "_REFUSED", {})
    return calls, engaged


def chosen(hidden_size, scores_only=True):
    hidden = torch.empty(4, hidden_size, dtype=torch.bfloat16)
    return anchored_logps._launch(hidden, scores_only)


def test_the_table_says_where(hopper):
    assert chosen(ANCHORED_SMALL_H) is SPECIALISED
    assert chosen(ANCHORED_SMALL_H + 64) is FLATTENED
    assert chosen(64, scores_only=False) is FLATTENED


def test_a_process_tries_once(hopper):
    calls, _ = hopper
    for _ in range(3):
        assert chosen(1024) is SPECIALISED
    assert calls == [SPECIALISED, FLATTENED]


def test_it_does_without_and_says_so_once(hopper):
    calls, engaged = hopper
    engaged[0] = "..."
    with pytest.warns(RuntimeWarning, match="the compiler ignored it"):
        assert chosen(1024) is FLATTENED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(1024) is FLATTENED
    assert calls == [SPECIALISED]


def test_other_parts_have_one_variant(monkeypatch):
    monkeypatch.setattr(anchored_logps, "architecture", lambda device: "sm_100")
    assert chosen(1024) is LAUNCHES["anchored_logps"][16, "sm_100"]
