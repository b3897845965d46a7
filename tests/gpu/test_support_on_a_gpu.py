"""The softmax over a support launched on a GPU, against a masked softmax in float64."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo.testing import relative_error
from oracle import DTYPES, GRADIENT_BARS, exact_logps, operands
from support_oracle import kept_masks, support_of, whole_where_nothing

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_and_that_they_repeat(dtype, transform):
    dtype, vocab = DTYPES[dtype], 5003
    hidden, weight, ids, options = operands(
        dtype, transform, sequences=6, length=20, hidden_size=128, vocab=vocab
    )
    kept, g = kept_masks(ids, vocab), torch.Generator().manual_seed(2)
    upstream = torch.randn((2, *ids.shape), generator=g)
    masked = {**options, "kept": whole_where_nothing(kept)}
    *wanted, grads = exact_logps(hidden, weight, ids, masked, *upstream)
    support = support_of(kept, ids).to(DEVICE)
    options = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    leaves = [x.to(DEVICE).requires_grad_() for x in (hidden, weight)]
    if "bias" in options:
        leaves.append(options["bias"].requires_grad_())
    runs = []
    for _ in range(2):
        out = fastgrpo.linear_logps(
            *leaves[:2], ids.to(DEVICE), support=support, entropy="differentiable", **options
        )
        found = torch.autograd.grad([out.logps, out.entropy], leaves, [*upstream.to(DEVICE)])
        runs.append((out.logps, out.entropy, out.lse, *found))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for actual, expected in zip(runs[0], wanted, strict=False):
        assert (actual.cpu() - expected).abs().max() <= 2e-5
    for actual, expected in zip(runs[0][3:], grads.values(), strict=True):
        assert relative_error(actual.cpu(), expected) <= GRADIENT_BARS[dtype]
