"""The sparse backward on the backends of this process: the kept entries and the gradients."""

from __future__ import annotations

import pytest
import torch

import fastgrpo_kernels
from fastgrpo import LossConfig, torch_kernels
from fastgrpo.head import sparse
from fastgrpo.head.loops import logps_fwd
from fastgrpo.head.plan import Plan
from fastgrpo.testing import make_batch, relative_error
from fastgrpo_kernels import Head, Rows
from fastgrpo_kernels.runtime import INTERPRETED
from oracle import HEADS, SHAPE, gradients


def test_a_seed_decides_every_bit(backend):
    batch = make_batch(**SHAPE)
    one, same, other = (
        gradients(batch, sparsity=0.03, seed=seed, backend=backend) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one[1:], same[1:], strict=True))
    assert not torch.equal(one[1], other[1])


def test_entries_of_rows_are_what_the_words_say(backend):
    """The kept set itself, on the backend of this process, against the definition."""
    kernels = {"triton": fastgrpo_kernels, "torch": torch_kernels}[backend]
    batch = make_batch(**SHAPE)
    rows = Rows(batch.hidden.flatten(0, 1), batch.completion_ids.flatten(), None)
    head = Head(batch.weight, None, 1.0, 0.0)
    plan = Plan.of(rows.hidden, head.weight, 0.05, kernels)
    scored = logps_fwd(rows, head, plan, False)
    words = sparse.Words.of(0.03, torch.tensor(7), len(rows.ids), 301)
    entries = sparse.entries_of(rows, head, plan, words, scored)
    z = rows.hidden.double() @ head.weight.double().t()
    e = (z.log_softmax(-1).exp() / 0.03).scatter_(1, rows.ids[:, None], 0.0)
    u = (words.column_words ^ words.row_words[:, None]) / 2.0**23
    for i in range(len(rows.ids)):
        count = entries.kept.count[i]
        assert entries.kept.ids[i, 0] == rows.ids[i]
        found = set(entries.kept.ids[i, 1:count].tolist())
        clear = (e[i] - u[i]).abs() > 1e-5
        wanted = (clear & (e[i] > u[i])).nonzero()[:, 0].tolist()
        assert {v for v in found if clear[v]} == set(wanted)
        picked = entries.kept.ids[i, :count].long()
        assert torch.allclose(entries.kept.logits[i, :count], z[i, picked].float(), atol=1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="compares the kernels with their twins")
@pytest.mark.parametrize("old", [True, False], ids=["in the forward", "in a second pass"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [
    pytest.param("grpo", id="grpo"),
    pytest.param("gspo", id="gspo", marks=pytest.mark.slow),
    pytest.param(LossConfig(entropy_coef=0.2), id="bonus", marks=pytest.mark.slow),
])  # fmt: skip
def test_kernels_and_twins_draw_the_same(config, dtype, head, old):
    """Kernels that draw in the epilogue (bf16) or from tiles (fp32), and torch: one gradient."""
    batch = make_batch(**SHAPE, dtype=dtype)
    head = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in head.items()}
    known = {} if old else {"old_logps": None, "ref_logps": None}
    if not old:
        batch = batch._replace(sampler_logps=None)
    kernel, twin = (
        gradients(batch, config=config, sparsity=0.03, seed=5, backend=name, **head, **known)
        for name in ("triton", "torch")
    )
    assert kernel[0].metrics["kept_entries"] == twin[0].metrics["kept_entries"]
    for a, b in zip(kernel[1:], twin[1:], strict=True):
        assert relative_error(a, b) <= (1e-5 if dtype == torch.float32 else 1e-3)
