"""The sparse backward launched on a GPU: its kernels against their twins, and its mean."""

from __future__ import annotations

import pytest
import torch

import fastgrpo_kernels as kernels
from fastgrpo import torch_kernels
from fastgrpo.head import sparse
from fastgrpo.head.loops import logps_fwd
from fastgrpo.head.plan import Plan
from fastgrpo.testing import Batch, make_batch, relative_error
from fastgrpo_kernels import Head, Rows
from oracle import SEEDS, assert_unbiased, gradients
from row_oracle import ENTRY_OPTIONS, entry_operands

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHAPE = dict(sequences=6, length=40, hidden_size=128, vocab=5003, logit_std=3.0, off_policy=0.1)


def on_device(batch: Batch, dtype=torch.bfloat16) -> Batch:
    batch = batch._replace(hidden=batch.hidden.to(dtype), weight=batch.weight.to(dtype))
    return Batch(*(x.to(DEVICE) for x in batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("known", [True, False], ids=["in the forward", "in a second pass"])
def test_kept_entries(known, dtype):
    """Set, logits and count of every row, on whichever route the device takes."""
    batch = on_device(make_batch(**SHAPE), dtype)
    found = []
    for device, backend in ((DEVICE, kernels), ("cpu", torch_kernels)):
        hidden, ids = batch.hidden.flatten(0, 1).to(device), batch.completion_ids.flatten()
        rows = Rows(hidden, ids.to(device), None)
        head = Head(batch.weight.to(device), None, 1.0, 0.0)
        plan = Plan.of(rows.hidden, head.weight, None, backend)
        words = sparse.Words.of(0.01, torch.tensor(7, device=device), len(ids), SHAPE["vocab"])
        if known:
            old = batch.old_logps.flatten().to(device)
            _, entries = sparse.logps_and_entries(rows, head, plan, True, words, old)
        else:
            scored = logps_fwd(rows, head, plan, False)
            entries = sparse.entries_of(rows, head, plan, words, scored)
        found.append(sparse.Entries(type(entries.kept)(*(x.cpu() for x in entries.kept)),
                                    entries.anchor.cpu()))  # fmt: skip
    torch.testing.assert_close(found[0].anchor, found[1].anchor, rtol=1e-5, atol=1e-5)
    differing = 0
    for (ids, z, count), (twin_ids, twin_z, twin_count) in zip(
        zip(*found[0].kept, strict=True), zip(*found[1].kept, strict=True), strict=True
    ):
        one = dict(zip(ids[:count].tolist(), z[:count].tolist(), strict=True))
        other = dict(zip(twin_ids[:twin_count].tolist(), twin_z[:twin_count].tolist(), strict=True))
        differing += len(one.keys() ^ other.keys())
        assert all(abs(one[v] - other[v]) < 1e-4 for v in one.keys() & other.keys())
    # Where e and u agree to the last digits a rounding decides.
    assert differing <= 1e-3 * found[1].kept.count.sum()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("config", ["grpo", "gspo"])
def test_the_mean(config, frozen):
    batch = make_batch(**SHAPE)
    batch = on_device(batch)
    exact = batch._replace(hidden=batch.hidden.double(), weight=batch.weight.double())
    _, *wanted = gradients(exact, frozen, config=config, backend="torch")
    runs = [gradients(batch, frozen, config=config, sparsity=0.03, seed=s) for s in range(SEEDS)]
    for i, gradient in enumerate(wanted, 1):
        assert_unbiased([run[i] for run in runs], gradient)


def test_a_seed_decides_every_bit_and_overflow_is_exact():
    batch = on_device(make_batch(**SHAPE))
    one, same = (gradients(batch, sparsity=0.01, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[1:], same[1:], strict=True))
    off = batch._replace(old_logps=batch.old_logps + 9.0)
    _, *wanted = gradients(off, config="reinforce")
    out, *dense = gradients(off, config="reinforce", sparsity=0.01, seed=1)
    assert out.metrics["overflow_rows"] == 1
    for actual, exact in zip(dense, wanted, strict=True):
        assert relative_error(actual, exact) <= 4e-3


@pytest.mark.parametrize("name", ENTRY_OPTIONS)
def test_dot_products_and_bags(name):
    rows, head, *_ = entry_operands(name)
    entries = torch.randint(1100, (len(rows.ids), 11), dtype=torch.int32)
    wanted = torch.zeros(len(rows.ids), 11)
    torch_kernels.entry_logits(rows, head, entries, None, wanted)
    found = torch.zeros_like(wanted, device=DEVICE)
    on_gpu = [
        type(operand)(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in operand))
        for operand in (rows, head)
    ]
    kernels.entry_logits(*on_gpu, entries.to(DEVICE), None, found)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-4)
    lengths = torch.arange(23) % 9 * (torch.arange(23) % 3)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    index, coef = torch.randint(57, (int(bounds[-1]),)), torch.randn(int(bounds[-1]))
    table, out = torch.randn(57, 72), torch.randn(23, 72)
    moved = [x.to(DEVICE) for x in (out, table, index, coef, bounds)]
    torch_kernels.bag_sum(out, table, index, coef, bounds)
    kernels.bag_sum(*moved)
    torch.testing.assert_close(moved[0].cpu(), out, rtol=1e-5, atol=1e-5)
