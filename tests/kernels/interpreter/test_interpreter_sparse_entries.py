"""The kernels of the sparse backward against their torch twins."""

from __future__ import annotations

import pytest
import torch

import fastgrpo_kernels as kernels
from fastgrpo import torch_kernels
from fastgrpo_kernels import Draw, Kept, Tile
from fastgrpo_kernels.sparse_entries import compact_mask
from row_oracle import ENTRY_OPTIONS, entry_operands


def empty_kept(n, slots, first=1):
    return Kept(
        torch.full((n, slots), -1, dtype=torch.int32),
        torch.zeros(n, slots),
        torch.full((n,), first, dtype=torch.int32),
    )


@pytest.mark.parametrize("slots", [24, 400], ids=["some overflow", "all fit"])
@pytest.mark.parametrize("name", ENTRY_OPTIONS)
def test_tile_draw(name, slots):
    rows, head, z, words = entry_operands(name)
    anchor = z.logsumexp(1) - 4.0 + torch.arange(len(z)) / 4  # from a few entries to hundreds
    anchor[3] = torch.nan
    found = []
    for impl in (kernels, torch_kernels):
        kept = empty_kept(len(z), slots)
        for start, stop in ((0, 600), (600, 1100)):  # slices of the vocabulary, one after another
            v = slice(start, stop)
            bias = None if head.bias is None else head.bias[v]
            tile = Tile(z[:, v].contiguous(), v, bias, rows, head)
            impl.tile_draw(tile, Draw(anchor, *words), kept)
        found.append(kept)
    kernel, twin = found
    assert torch.equal(kernel.count, twin.count)
    assert kernel.count[3] == 1, "nothing is drawn for NaN"
    assert (kernel.count.max() > slots) == (slots == 24)
    assert torch.equal(kernel.ids, twin.ids)
    torch.testing.assert_close(kernel.logits, twin.logits)
    assert not (kernel.ids == rows.ids[:, None]).any(), "the target has its own slot"


def test_compact_mask():
    n, words, slots = 9, 24, 40
    mask = torch.randint(-(2**31), 2**31, (n, words), dtype=torch.int32)
    mask &= torch.randint(-(2**31), 2**31, (n, words), dtype=torch.int32)
    mask[0], mask[1] = 0, -1
    mask[2:] = torch.where(torch.rand(n - 2, words) < 0.7, 0, mask[2:])
    kept = empty_kept(n, slots)
    compact_mask(mask, kept)
    for i in range(n):
        columns = [
            v for v in range(32 * words)
            if mask[i, 4 * (v // 128) + v // 2 % 4].item() >> (2 * (v // 8 % 16) + v % 2) & 1
        ]  # fmt: skip
        assert kept.count[i] == 1 + len(columns)
        found = kept.ids[i, 1 : 1 + len(columns)].tolist()
        assert len(set(found)) == len(found) == min(len(columns), slots - 1)
        assert set(found) <= set(columns)
    assert (kept.ids[:, 0] == -1).all() and kept.count[1] == 1 + 32 * words


@pytest.mark.parametrize("slots", [24, 400], ids=["some overflow", "all fit"])
@pytest.mark.parametrize("name", ENTRY_OPTIONS)
def test_drawn_in_the_epilogue(name, slots, monkeypatch):
    """The same entries as from tiles of logits, with the same logits; rows that fail overflow."""
    monkeypatch.setattr("fastgrpo_kernels.sparse_entries.MASK_BYTES", 2000)  # several blocks
    rows, head, _, words = entry_operands(name, torch.bfloat16)
    head, ids = head._replace(weight=(head.weight.float() / 4).bfloat16()), rows.ids
    z0 = rows.hidden.float() @ head.weight.float().t()
    anchor = kernels.linear_logps_fwd(rows, head, False).lse - 4.0
    anchor[3], anchor[5] = torch.nan, 1e4
    tiled, drawn = empty_kept(len(ids), slots), empty_kept(len(ids), slots)
    for kept in (tiled, drawn):
        kept.ids[:, 0] = ids
    draw = Draw(anchor, *words)
    kernels.tile_draw(Tile(z0, slice(0, 1100), head.bias, rows, head), draw, tiled)
    scores = kernels.linear_draw_fwd(rows, head, True, draw, drawn)
    for actual, wanted in zip(scores, kernels.linear_logps_fwd(rows, head, True), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    assert (drawn.count[[3, 5]] == slots + 1).all()
    for i in set(range(len(ids))) - {3, 5}:
        assert drawn.count[i] == tiled.count[i]
        if drawn.count[i] <= slots:
            one, other = (
                dict(zip(k.ids[i, : k.count[i]].tolist(), k.logits[i].tolist(), strict=False))
                for k in (drawn, tiled)
            )
            assert one.keys() == other.keys()
            del one[ids[i].item()], other[ids[i].item()]
            assert all(abs(one[v] - other[v]) < 1e-4 for v in one)
    assert (drawn.count.max() > slots + 1) == (slots == 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("slots", [1, 11])
@pytest.mark.parametrize("name", ENTRY_OPTIONS)
def test_entry_logits(name, slots, dtype):
    rows, head, *_ = entry_operands(name, dtype)
    n = len(rows.ids)
    entries = torch.randint(1100, (n, slots), dtype=torch.int32)
    count = None if slots == 1 else torch.arange(n, dtype=torch.int32)
    out = torch.zeros(n, slots)
    kernels.entry_logits(rows, head, entries, count, out)
    z = torch.einsum("nh,nkh->nk", rows.hidden.double(), head.weight[entries.long()].double())
    if head.bias is not None:
        z = (z + head.bias[entries.long()].double()) * head.logit_scale
        z = head.softcap * torch.tanh(z / head.softcap)
    if rows.inv_temperature is not None:
        z = z * rows.inv_temperature[:, None]
    meant = torch.arange(slots) < (slots if count is None else count[:, None])
    torch.testing.assert_close(out.double(), torch.where(meant, z, 0.0), rtol=1e-5, atol=1e-5)
    twin = torch.zeros_like(out)
    torch_kernels.entry_logits(rows, head, entries, count, twin)
    torch.testing.assert_close(torch.where(meant, twin, 0.0), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", [kernels, torch_kernels], ids=["kernel", "twin"])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("hidden_size", [1, 72])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_bag_sum(impl, hidden_size, table_dtype, out_dtype, transposed, monkeypatch):
    monkeypatch.setattr("fastgrpo.torch_kernels.sparse_entries.BLOCK", 700)  # several blocks
    bags, rows = 23, 57
    lengths = torch.randint(0, 9, (bags,))
    lengths[[0, 5, 6, 22]] = 0
    lengths[9] = 61  # a frequent token
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    index = torch.randint(rows, (int(bounds[-1]),))
    coef, table = torch.randn(len(index)), torch.randn(rows, hidden_size).to(table_dtype)
    out = torch.randn(bags, hidden_size).to(out_dtype)
    out = out.t().contiguous().t() if transposed else out
    before = out.clone()
    impl.bag_sum(out, table, index, coef, bounds)
    wanted = before.double()
    bag = torch.repeat_interleave(torch.arange(bags), lengths)
    wanted.index_add_(0, bag, coef[:, None].double() * table[index].double())
    tolerance = 1e-5 if out_dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(out[lengths == 0], before[lengths == 0])
