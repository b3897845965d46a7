"""The prototypes of `benchmarks.sparse_epilogues` draw what plain torch on integers draws."""

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import sparse_epilogues as study

N, V, H = 40, 300, 16
MASKS = {
    study.mask_shifted: lambda v: (v // 32, v % 32),
    study.mask_by_lanes: lambda v: (v // 32, v % 32),
    study.mask_by_bytes: lambda v: (v // 128 * 4 + v // 2 % 4, v // 8 % 16 * 2 + v % 2),
    study.mask_in_threads: lambda v: (v // 128 * 4 + v // 2 % 4, v // 8 % 16 * 2 + v % 2),
}
BITS = {
    study.sum_uniform: 23,
    study.xor_uniform: 23,
    study.wrapping_sum_uniform: 32,
    study.multiply_shift_uniform: 32,
}


def _name(function) -> str:
    return function.__name__


def _words(uniform, size: int) -> torch.Tensor:
    bits = BITS[uniform]
    words = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (size,)) % 2**bits
    return words.to(torch.int32)


def _numbers(uniform, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same uniform numbers, from integers of any size."""
    a, b = (words.long() % 2**32 for words in (a[None, :], b[:, None]))
    if uniform is study.sum_uniform:
        return (a + b) % 2**23 / 2**23
    if uniform is study.xor_uniform:
        return (a ^ b) % 2**23 / 2**23
    if uniform is study.wrapping_sum_uniform:
        return (a + b) % 2**32 // 2**9 / 2**23
    words = (a * 0x9E3779B1 + b) % 2**32
    words = (words ^ (words >> 15)) * 0x85EBCA77 % 2**32
    return (words >> 8) / 2**24


def _draw(way, uniform, width: int):
    """Run the kernel on small blocks; return what it wrote, and what should be kept."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    ids = torch.randint(V, (N,), dtype=torch.int32)
    a, b = _words(uniform, V), _words(uniform, N)
    if uniform is study.xor_uniform:
        a |= 0x3F800000
    z = hidden @ weight.T
    anchor = z.max(1).values + 1
    out = torch.zeros(N if width else -(-V // 128), width or N, dtype=torch.int32)
    sums, slots = torch.zeros(-(-V // 128), N), torch.zeros(N, dtype=torch.int32)
    blocks = ((hidden, [32, H]), (weight, [128, H]))
    study.forward_kernel[(3,)](
        *(TensorDescriptor.from_tensor(x, block) for x, block in blocks),
        *(ids, anchor, a, b, sums, out, slots, N, V, width, 1.0),
        *(H, 3, uniform, way, 32, 128, H),
    )
    e = torch.exp2(z - anchor[:, None]).scatter(1, ids.long()[:, None], 0.0)
    torch.testing.assert_close(sums.sum(0), e.sum(1))
    keep = e > _numbers(uniform, a, b)
    assert 0.001 < keep.float().mean() < 0.1
    return out, slots, keep


@pytest.mark.parametrize("uniform", BITS, ids=_name)
@pytest.mark.parametrize("way", MASKS, ids=_name)
def test_mask_has_the_kept_entries(way, uniform):
    out, _, keep = _draw(way, uniform, width=12)
    word, bit = MASKS[way](torch.arange(V))
    assert torch.equal((out[:, word] >> bit & 1).bool(), keep)
    word, bit = MASKS[way](torch.arange(V, 384))
    assert not (out[:, word] >> bit & 1).any(), "a bit beyond V"


@pytest.mark.parametrize("way", [study.append_each, study.append_rows], ids=_name)
def test_append_has_the_kept_entries(way):
    out, slots, keep = _draw(way, study.sum_uniform, width=48)
    assert torch.equal(slots, keep.sum(1).int()) and slots.max() <= 48
    for row, count, kept in zip(out, slots, keep, strict=True):
        assert torch.equal(row[:count].sort().values.long(), kept.nonzero()[:, 0])


@pytest.mark.parametrize("way", [study.count_entries, study.any_entry], ids=_name)
def test_count_of_the_kept_entries(way):
    out, _, keep = _draw(way, study.sum_uniform, width=0)
    padded = torch.nn.functional.pad(keep, (0, 384 - V))
    expected = padded.view(N, 3, 128).sum(2).T.int()
    assert torch.equal(out, expected if way is study.count_entries else expected.clamp(max=1))


@pytest.mark.parametrize("uniform", BITS, ids=_name)
def test_numbers_are_uniform_over_the_words(uniform):
    """For any word of the column: exactly, where the row's word only moves them around."""
    steps = torch.arange(2**12) * 2 ** (BITS[uniform] - 12)
    column = _words(uniform, 1)
    numbers = _numbers(uniform, column, steps)[:, 0].sort().values
    if uniform is study.multiply_shift_uniform:
        assert (numbers - torch.arange(2**12) / 2**12).abs().max() < 0.05
    else:
        assert (numbers - torch.arange(2**12) / 2**12).max() < 2**-12 and numbers.diff().min() > 0
