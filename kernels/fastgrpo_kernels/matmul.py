"""The one GEMM that is not ours: PyTorch's, with fp32 results of 16-bit operands if asked."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_tunable_op = threading.Lock()  # its switch is of the process, not of a thread


def matmul(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b. 16-bit operands may give fp32 results: out's dtype decides."""
    if a.dtype == out.dtype:
        _multiply(out, a, b, accumulate)
        return
    # PyTorch's TunableOp (PYTORCH_TUNABLEOP_ENABLED=1) raises for fp32 results of 16-bit operands.
    with _tunable_op:
        tunable = torch.cuda.tunable
        tuned = a.is_cuda and tunable.is_enabled()
        if tuned:
            tunable.enable(False)
        try:
            _multiply(out, a, b, accumulate, out_dtype=out.dtype)
        finally:
            if tuned:
                tunable.enable(True)


def _multiply(out: Tensor, a: Tensor, b: Tensor, accumulate: bool, **mixed: torch.dtype) -> None:
    if accumulate:
        torch.addmm(out, a, b, out=out, **mixed)
    else:
        torch.mm(a, b, out=out, **mixed)
