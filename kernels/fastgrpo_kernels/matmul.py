"""The one GEMM that is not ours: PyTorch's, with results wider than operands where asked."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b, in out's dtype also where the operands have 16 bits."""
    mixed = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **mixed)
    else:
        torch.mm(a, b, out=out, **mixed)
