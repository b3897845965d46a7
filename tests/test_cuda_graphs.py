"""Ops for which the host waits are in no CUDA graph: a clear error in one, a tag for compilers."""

from __future__ import annotations

import contextlib

import pytest
import torch

import fastgrpo
from fastgrpo import FusedLM, LossConfig, checks
from fastgrpo.testing import make_batch
from fastgrpo_kernels import runtime
from model_families import VOCAB, tiny

ERROR = "^fastgrpo: expected a call outside of a CUDA graph, got one while a graph is captured on "
OPS = sorted(x for x in torch._C._dispatch_get_all_op_names() if x.startswith("fastgrpo::"))


@pytest.fixture
def captured(monkeypatch):
    """captured(): from here on, every device is as one on which a graph is captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(runtime, "_current", lambda device: contextlib.nullcontext())

    def captured():
        monkeypatch.setattr(checks, "capturing", lambda _: runtime.capturing(torch.device("cuda")))

    return captured


def test_a_cpu_has_no_captures(captured):
    assert runtime.capturing(torch.device("cuda")) and not runtime.capturing(torch.device("cpu"))


@pytest.mark.parametrize("config", ["grpo", LossConfig(entropy="differentiable")])
def test_a_loss(config, captured):
    batch = make_batch()
    captured()
    with pytest.raises(RuntimeError, match=ERROR):
        fastgrpo.grpo_loss(
            batch.hidden.requires_grad_(), *batch[1:5], old_logps=batch.old_logps, config=config
        )


def test_log_probs_and_their_backward(captured):
    batch = make_batch()
    ids = batch.completion_ids.clamp(min=0)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    before = fastgrpo.linear_logps(hidden, weight, ids).logps.sum()
    captured()
    with pytest.raises(RuntimeError, match=ERROR):
        fastgrpo.linear_logps(hidden, weight, ids)
    with pytest.raises(RuntimeError, match=ERROR):
        before.backward()


def test_packed_rows_of_a_model(captured):
    lm = FusedLM(tiny("qwen2"))
    ids = torch.arange(3, 19).view(2, 8) % VOCAB
    scored, sequence_ids = (torch.arange(8) > 2).expand(2, 8), torch.arange(2)[:, None].expand(2, 8)
    captured()
    lm.model.forward = lm.base_model.forward = None  # the error comes before any work
    with pytest.raises(RuntimeError, match=ERROR):
        lm(ids, None, scored, torch.ones(2), sequence_ids=sequence_ids)


@pytest.mark.parametrize("name", OPS)
def test_compilers_leave_an_op_out_of_their_graphs(name):
    op = getattr(torch.ops.fastgrpo, name.removeprefix("fastgrpo::")).default
    assert torch.Tag.cudagraph_unsafe in op.tags and torch.Tag.pt2_compliant_tag in op.tags
