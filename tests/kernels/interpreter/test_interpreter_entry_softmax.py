"""The kernels of the softmax over a list of entries, against float64 and their torch twins."""

from __future__ import annotations

import pytest
import torch

import fastgrpo_kernels as kernels
from fastgrpo import torch_kernels
from fastgrpo.packing import rows_of_entries
from fastgrpo_kernels import EntryList, Head, Logps, Rows, Upstream
from row_oracle import ENTRY_OPTIONS, entry_operands

# Nothing between rows, one, as many as a block, more than two blocks, all.
COUNTS = (0, 1, 128, 0, 0, 300, 2, 1100, 1, 7, 129, 5, 0)


def entry_list(rows, vocab):
    """Entries of rows whose target is the last of them, and their bounds; z is random."""
    bounds = torch.nn.functional.pad(torch.tensor(COUNTS).cumsum(0), (1, 0))
    g = torch.Generator().manual_seed(3)
    ids = []
    for target, count in zip(rows.ids.tolist(), COUNTS, strict=True):
        others = torch.randperm(vocab, generator=g)
        ids += [*others[others != target][: max(count - 1, 0)].tolist(), *[target] * (count > 0)]
    ids, row = torch.tensor(ids), rows_of_entries(bounds, len(ids))
    z = 3 * torch.randn(len(ids), generator=g)
    return EntryList(row, ids, ids == rows.ids[row], z), bounds


def exact(operand):
    """The same in float64."""
    return type(operand)(*(
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in operand
    ))  # fmt: skip


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_entry_dots(dtype, weight_dtype):
    """Added to what is there: a row of the weight may be put together of two tables."""
    rows, head, *_ = entry_operands("plain", dtype)
    weight = head.weight.to(weight_dtype)
    entries, _ = entry_list(rows, len(weight))
    out = entries.z.clone()
    kernels.entry_dots(out, rows.hidden, entries.row, weight, entries.ids)
    products = rows.hidden.double()[entries.row] * weight.double()[entries.ids]
    torch.testing.assert_close(out.double(), entries.z + products.sum(1), rtol=1e-5, atol=1e-5)
    moved = torch.zeros(len(weight), 80)[:, 3:75].copy_(weight), weight.t().contiguous().t()
    for table in moved:
        again = entries.z.clone()
        kernels.entry_dots(again, rows.hidden, entries.row, table.to(weight_dtype), entries.ids)
        assert torch.equal(again, out)


@pytest.mark.parametrize("name", ENTRY_OPTIONS)
def test_segment_softmax(name):
    rows, head, *_ = entry_operands(name)
    found = []
    for impl, given_rows, given_head in (
        (kernels, rows, head), (torch_kernels, exact(rows), exact(head))
    ):  # fmt: skip
        entries, bounds = entry_list(rows, len(head.weight))
        entries = entries if impl is kernels else exact(entries)
        scored = impl.segment_softmax(entries, bounds, given_rows, given_head, True)
        found.append((entries.z, scored))
    (z, scored), (exact_z, wanted) = found
    torch.testing.assert_close(z.double(), exact_z, rtol=1e-5, atol=1e-5)
    kept = torch.tensor(COUNTS) > 0
    for actual, expected in zip(scored, wanted, strict=True):
        torch.testing.assert_close(actual.double()[kept], expected[kept], rtol=1e-5, atol=1e-5)
    alone = torch.tensor(COUNTS) == 1
    assert (scored.logps[alone] == 0).all() and (scored.entropy[alone] == 0).all()


def test_what_a_softmax_makes_of_infinities_and_nan():
    """The torch twin says what is right: NaN in its own row, -inf without a trace in the others."""
    inf, nan = torch.inf, torch.nan
    z = [[-inf, 1.0, 2.0], [1.0, -inf], [-inf, -inf], [nan, 1.0], [3.0, 4.0], [90.0, -90.0]]
    z += [[inf], [1.0, inf], [inf, 1.0]]
    target_at = [1, 1, 0, 1, None, 1, 0, 1, 1]
    row = torch.tensor([i for i, some in enumerate(z) for _ in some])
    is_target = torch.tensor(
        [j == target_at[i] for i, some in enumerate(z) for j, _ in enumerate(some)]
    )
    bounds = torch.nn.functional.pad(torch.tensor([len(some) for some in z]).cumsum(0), (1, 0))
    n = len(z)
    rows, head = Rows(torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64)), Head(torch.zeros(n, 1))
    found = []
    for impl in (kernels, torch_kernels):
        entries = EntryList(row, row, is_target, torch.tensor(sum(z, [])))
        found.append(impl.segment_softmax(entries, bounds, rows, head, True))
    kernel, twin = found
    torch.testing.assert_close(kernel.logps, twin.logps, equal_nan=True)
    torch.testing.assert_close(kernel.lse, twin.lse, equal_nan=True)
    usable = [0, 1, 4, 5]
    torch.testing.assert_close(kernel.entropy[usable], twin.entropy[usable])
    assert kernel.logps.isnan().tolist() == [False, False, True, True, True, False] + [True] * 3


def test_a_confident_row_keeps_the_digits_of_what_is_left():
    """1 - p of 1e-9, which log(1 + 1e-9) in fp32 would lose."""
    gap = torch.tensor([5.0, 12.0, 20.0])
    z = torch.stack([-gap, torch.zeros(3)], 1).flatten()
    row, is_target = torch.arange(3).repeat_interleave(2), torch.tensor([False, True] * 3)
    rows, head = Rows(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)), Head(torch.zeros(9, 1))
    entries = EntryList(row, row, is_target, z)
    scored = kernels.segment_softmax(entries, torch.tensor([0, 2, 4, 6]), rows, head, False)
    torch.testing.assert_close(scored.logps.double(), -torch.log1p((-gap.double()).exp()),
                               rtol=1e-5, atol=0)  # fmt: skip
    dz0 = kernels.entry_grads(entries, rows, head, scored, Upstream(torch.ones(3)))
    torch.testing.assert_close(dz0.view(3, 2).sum(1), torch.zeros(3), rtol=0, atol=1e-7)
    torch.testing.assert_close(dz0[1::2].double(), torch.sigmoid(-gap.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("drawn", [False, True], ids=["all there", "drawn"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["log-probs", "and entropy"])
@pytest.mark.parametrize("name", ENTRY_OPTIONS)
def test_entry_grads(name, with_entropy, drawn):
    rows, head, *_ = entry_operands(name)
    entries, bounds = entry_list(rows, len(head.weight))
    scored = kernels.segment_softmax(entries, bounds, rows, head, True)
    n, g = len(rows.ids), torch.Generator().manual_seed(4)
    upstream = Upstream(*torch.randn(2, n, generator=g))
    upstream = upstream if with_entropy else upstream._replace(dentropy=None)
    inclusion = torch.rand(len(entries.z), generator=g) + 0.1 if drawn else None
    actual = kernels.entry_grads(entries, rows, head, scored, upstream, inclusion)
    wanted = torch_kernels.entry_grads(
        exact(entries), exact(rows), exact(head), exact(scored), exact(upstream),
        None if inclusion is None else inclusion.double(),
    )  # fmt: skip
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_target_without_a_chance():
    """Its log-prob is -inf, and the gradient of the others is finite."""
    row, z = torch.zeros(2, dtype=torch.int64), torch.tensor([1.0, -torch.inf])
    rows, head = Rows(torch.zeros(1, 1), row[:1]), Head(torch.zeros(9, 1))
    entries = EntryList(row, row, torch.tensor([False, True]), z)
    scored = Logps(torch.tensor([-torch.inf]), torch.ones(1), torch.zeros(1))
    dz0 = kernels.entry_grads(entries, rows, head, scored, Upstream(torch.ones(1), torch.ones(1)))
    assert dz0.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("impl", [kernels, torch_kernels], ids=["kernel", "twin"])
@pytest.mark.parametrize("hidden_size", [1, 72])
def test_sum_by_id(impl, hidden_size, monkeypatch):
    monkeypatch.setattr("fastgrpo.torch_kernels.sparse_entries.SUM_BLOCK", 300)  # several blocks
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 90, (200,), generator=g).sort().values
    ids[30:110] = ids[30]  # a frequent token
    ids = ids.sort().values
    table, coef = torch.randn(57, hidden_size, generator=g), torch.randn(200, generator=g)
    index = torch.randint(57, (200,), generator=g)
    out = torch.randn(97, hidden_size, generator=g)
    before = out.clone()
    impl.sum_by_id(out, ids, table, index, coef)
    wanted = before.double().index_add_(0, ids, coef[:, None].double() * table[index].double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    absent = ~torch.isin(torch.arange(97), ids)
    assert absent[90:].all() and torch.equal(out[absent], before[absent])
