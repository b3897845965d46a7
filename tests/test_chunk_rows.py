"""How many rows a pass takes at once on a GPU, and the memory for it: arithmetic, no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastgrpo import torch_kernels
from fastgrpo.head import plan as planning
from fastgrpo.head.plan import Needs, Plan, chunk_rows, chunks, padded
from fastgrpo_kernels import Head

TRAINABLE, FROZEN = Needs(True, True, False), Needs(True, False, False)
SMS = 132  # of an H100 or H200


def efficiency(rows, hidden_size):
    """How full the waves of tiles are in which a GEMM makes (rows, hidden_size) numbers."""
    full = -(-rows // 128) * -(-hidden_size // 256)
    return full / (-(-full // SMS) * SMS)


@pytest.mark.parametrize("hidden_size", [1024, 2048, 2560, 3584, 4096])
@pytest.mark.parametrize("n", [1, 100, 4096, 8192, 16384, 65536])
@pytest.mark.parametrize("most", [1, 60, 4000, 7067, 8192])
def test_chunks_fit_and_are_balanced(n, most, hidden_size):
    rows = chunk_rows(n, most, hidden_size, SMS, accumulate=True)
    sizes = [c.stop - c.start for c in chunks(n, rows)]
    assert sum(sizes) == n and max(sizes) <= most
    assert len(sizes) <= -(-n // most) + 8
    if most >= 128:  # within one tile of the others, each
        assert max(sizes) - sizes[-1] <= 128 * len(sizes)


def test_one_chunk_needs_no_accumulator():
    for hidden_size in (1024, 2560, 4096):
        assert chunk_rows(8192, 8192, hidden_size, SMS, accumulate=True) == 8192


def test_waves_are_filled_where_it_costs_little():
    """At H = 2560, 4096 rows are 2.4 waves of tiles, of which 3 are paid."""
    assert efficiency(4096, 2560) < 0.81 < 0.96 < efficiency(8192, 2560)
    free = chunk_rows(16384, 7000, 2560, SMS, accumulate=False)
    assert efficiency(free, 2560) > efficiency(16384 / 3, 2560)
    # A further chunk's addition to dweight costs more than a wave that is not full.
    assert chunk_rows(16384, 7000, 2560, SMS, accumulate=True) >= free


def plan_on_a_gpu(monkeypatch, n, hidden_size, vocab):
    """The plan for bf16 operands of these shapes, none of which exists."""
    monkeypatch.setattr(planning, "multiprocessors", lambda device: SMS)
    hidden, weight = (
        SimpleNamespace(
            shape=shape, dtype=torch.bfloat16, is_cuda=True, device=torch.device("cuda")
        )
        for shape in ((n, hidden_size), (vocab, hidden_size))
    )
    return Plan.of(hidden, weight, None, torch_kernels), Head(weight)


@pytest.mark.parametrize("needs", [TRAINABLE, FROZEN], ids=["trainable", "frozen"])
def test_the_peak_of_a_large_head(monkeypatch, needs):
    """8192 x 4096 x 151,936, bf16: below 5.5 GB beyond the inputs, gradients and workspace in."""
    n, h, v = 8192, 4096, 151_936
    plan, head = plan_on_a_gpu(monkeypatch, n, h, v)
    rows = plan.exps_chunk(n, head, needs)
    exps = 2 * rows * padded(v)
    assert exps <= planning.default_workspace_mb(v, "cuda") * planning.MIB <= 2560 * planning.MIB
    assert rows == n, "one chunk: dweight needs no sum in fp32"
    dhidden = 4 * n * h + 2 * n * h  # summed in fp32, returned in bf16
    per_chunk = rows * h * (2 + 2 + 4)  # scaled rows, the targets' rows of weight, both widths
    partials = 64 * planning.MIB
    sums = 0
    if needs.weight:
        sums = 2 * v * h + 4 * plan.chunk_width * h if rows >= n else 4 * v * h
    during = exps + sums + dhidden + per_chunk + partials
    after = dhidden + (2 * v * h + sums if needs.weight and rows < n else sums)
    assert max(during, after) < 5.5e9
    # What a full second set of fp32 sums or logits would do to it.
    assert max(during, after) + 4 * n * v > 5.5e9
