"""The one GEMM that is not ours: PyTorch's, with fp32 results of 16-bit operands if asked."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b. 16-bit operands may give fp32 results: out's dtype decides."""
    mixed = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **mixed)
    else:
        torch.mm(a, b, out=out, **mixed)
