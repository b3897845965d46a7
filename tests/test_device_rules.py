"""Choices that depend on the GPU, tested without one by patching the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fastgrpo_kernels
from fastgrpo import torch_kernels
from fastgrpo.backend import resolve
from fastgrpo.head.gradients import Targets
from fastgrpo_kernels import Head, Rows, runtime
from fastgrpo_kernels import matmul as product

CUDA = torch.device("cuda")


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("capability, kernels", [
    ((7, 0), torch_kernels), ((7, 5), torch_kernels), ((8, 0), fastgrpo_kernels),
    ((9, 0), fastgrpo_kernels), ((12, 0), fastgrpo_kernels),
])  # fmt: skip
def test_auto_takes_the_kernels_where_they_run(monkeypatch, capability, kernels):
    """V100 and T4 are older than what the kernels need: torch, and no error."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert resolve(CUDA, "auto") is kernels
    assert resolve(CUDA, "triton") is fastgrpo_kernels
    assert resolve(torch.device("cpu"), "auto") is torch_kernels


@pytest.mark.parametrize("tuned", [True, False])
def test_tunable_op_is_off_during_a_mixed_product(monkeypatch, tuned):
    """PyTorch's TunableOp raises for results wider than operands."""
    state, seen = {"on": tuned}, []
    tunable = SimpleNamespace(
        is_enabled=lambda: state["on"], enable=lambda on=True: state.update(on=on)
    )
    monkeypatch.setattr(torch.cuda, "tunable", tunable)
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: seen.append(state["on"]))
    on_gpu = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True)
    product(SimpleNamespace(dtype=torch.float32), on_gpu, on_gpu)
    assert seen == [False] and state["on"] is tuned


def test_a_foreign_id_reaches_no_gather():
    """On a GPU an index beyond the weight would end the process's context."""
    rows = Rows(torch.randn(3, 4), torch.tensor([1, 7, -2]))
    dhidden = torch.zeros(3, 4)
    coef = torch.tensor([0.5, torch.nan, 0.0])
    Targets(coef).add_to(dhidden, rows, Head(torch.ones(5, 4)))
    assert torch.equal(dhidden[0], torch.full((4,), 0.5)) and (dhidden[2] == 0).all()
    assert dhidden[1].isnan().all()
