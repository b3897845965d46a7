"""Choices that depend on the GPU, tested without one by patching the device."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fastgrpo import torch_kernels
from fastgrpo.dispatch import choice
from fastgrpo.head.gradients import Targets
from fastgrpo_kernels import Head, Rows, runtime
from fastgrpo_kernels import matmul as product

CUDA = torch.device("cuda")


def on(device):
    """What `choose` looks at of a tensor there."""
    return SimpleNamespace(device=device, dtype=torch.float32)


@pytest.mark.skipif(not runtime.HAS_TRITON or runtime.INTERPRETED, reason="compiled kernels")
@pytest.mark.parametrize("capability, version, obstacle", [
    ((7, 0), "3.7.1", "compute capability 8.0 or newer, got 7.0"),
    ((7, 5), "3.7.1", "compute capability 8.0 or newer, got 7.5"),
    ((8, 0), "3.6.0", ""), ((9, 0), "3.6.0", ""), ((12, 0), "3.6.0", ""),
    ((10, 0), "3.6.0", "compute capability 10.0 needs Triton 3.7, got 3.6.0"),
    ((10, 3), "3.7.0", ""), ((10, 0), "3.10.0+git1", ""),
])  # fmt: skip
def test_auto_takes_the_kernels_where_they_run(monkeypatch, capability, version, obstacle):
    """Elsewhere it takes torch without an error, and a named backend says what is in the way."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(runtime.triton, "__version__", version)
    monkeypatch.setenv("FASTGRPO_SELF_CHECK", "0")
    auto, _ = choice.choose("auto", on(CUDA), None, False)
    assert (auto is torch_kernels) == bool(obstacle)
    if obstacle:
        with pytest.raises(ValueError, match=obstacle):
            choice.choose("triton", on(CUDA), None, False)
    else:
        assert choice.choose("triton", on(CUDA), None, False)[0] is auto is choice.PORTABLE
    assert choice.choose("auto", on(torch.device("cpu")), None, False) == (torch_kernels, None)


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


def test_tunable_op_is_off_in_every_thread(monkeypatch):
    """A thread whose product ends must not turn it on within that of another."""
    state, seen, inside = {"on": True}, [], threading.Event()
    tunable = SimpleNamespace(
        is_enabled=lambda: state["on"], enable=lambda on=True: state.update(on=on)
    )

    def mm(*args, **kwargs):
        if not inside.is_set():
            inside.set()
            second.start()
            second.join(0.2)
        else:
            time.sleep(0.3)
        seen.append(state["on"])

    monkeypatch.setattr(torch.cuda, "tunable", tunable)
    monkeypatch.setattr(torch, "mm", mm)
    on_gpu = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True)
    work = (SimpleNamespace(dtype=torch.float32), on_gpu, on_gpu)
    second = threading.Thread(target=product, args=work)
    product(*work)
    second.join()
    assert seen == [False, False] and state["on"]


def test_a_foreign_id_reaches_no_gather():
    """On a GPU an index beyond the weight would end the process's context."""
    rows = Rows(torch.randn(3, 4), torch.tensor([1, 7, -2]))
    dhidden = torch.zeros(3, 4)
    coef = torch.tensor([0.5, torch.nan, 0.0])
    Targets(coef).add_to(dhidden, rows, Head(torch.ones(5, 4)))
    assert torch.equal(dhidden[0], torch.full((4,), 0.5)) and (dhidden[2] == 0).all()
    assert dhidden[1].isnan().all()
