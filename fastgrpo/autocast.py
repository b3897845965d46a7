"""What autocast on CUDA makes of the operands of the head: 16 bits, as of those of a linear layer.

The logits stay fp32. On a CPU, where no product turns 16-bit operands into fp32, autocast changes
nothing.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Operand = TypeVar("Operand")
CAST = (torch.bfloat16, torch.float16, torch.float32)  # fp64 is left alone, as by PyTorch


def operand_dtype(
    device_type: str, enabled: bool, autocast_dtype: torch.dtype, dtype: torch.dtype
) -> torch.dtype:
    """Return the dtype that an operand on a device has in a product under autocast on CUDA."""
    return autocast_dtype if enabled and device_type == "cuda" and dtype in CAST else dtype


def operand(x: Operand) -> Operand:
    """Return hidden states or a weight as autocast asks for; the gradient has the dtype of x.

    What is no tensor comes back as it is, for the checks to name it.
    """
    if not isinstance(x, Tensor):
        return x
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return x.to(operand_dtype(x.device.type, enabled, dtype, x.dtype))
