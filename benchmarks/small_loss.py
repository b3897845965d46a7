"""Run one small loss on the kernels, forward and backward: what NVIDIA's sanitizer looks at.

    compute-sanitizer --tool memcheck python -m benchmarks.small_loss

Needs a GPU, or TRITON_INTERPRET=1.
"""

from __future__ import annotations

import torch

import fastgrpo
from benchmarks import environment
from fastgrpo.testing import make_batch

# Sequences, length, H and V, no multiples of any block.
SIZE = (6, 61, 72, 1031)
INTERPRETED_SIZE = (2, 5, 16, 131)  # in seconds, not in minutes


def main() -> None:
    """Print the loss of some hundred rows, with exact gradients and with sparse ones.

    Raises SystemExit if a gradient is not finite.
    """
    device = environment.device().type
    size = SIZE if device == "cuda" else INTERPRETED_SIZE
    batch = make_batch(*size, torch.bfloat16, device=device)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    for options in ({}, {"sparsity": 1e-2, "seed": 0}):
        out = fastgrpo.grpo_loss(
            hidden, weight, *batch[2:5], old_logps=batch.old_logps, backend="triton", **options
        )
        out.loss.backward()
        print(f"{options}: loss {out.loss.item():.6f}", flush=True)
        for gradient in (hidden.grad, weight.grad):
            if not gradient.isfinite().all():
                raise SystemExit("a gradient is not finite")


if __name__ == "__main__":
    main()
