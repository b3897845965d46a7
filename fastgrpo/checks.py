"""Errors that name the argument, what was expected and what came.

Shapes, dtypes and devices are always checked. Looking at *values* (token ids in range, temperatures
above zero) would make a GPU wait for the host: it is done on CPUs, and on GPUs inside `checked()`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgrpo_kernels.runtime import capturing

_values_checked_on_gpu: ContextVar[bool] = ContextVar("values_checked_on_gpu", default=False)
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


@contextlib.contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Within this context values are checked on GPUs too, which makes the host wait for them.

    It holds for the thread, or the asynchronous task, that enters it.
    """
    token = _values_checked_on_gpu.set(enabled)
    try:
        yield
    finally:
        _values_checked_on_gpu.reset(token)


def looks_at_values(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or _values_checked_on_gpu.get()


def no_capture(device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is captured: the host cannot wait for a number then."""
    if capturing(device):
        raise RuntimeError(
            "fastgrpo: expected a call outside of a CUDA graph, got one while a graph is captured"
            f" on {device}; the host waits for the number of unmasked rows. Capture the model"
            " alone, and call fastgrpo on what it returns; torch.compile does that by itself"
        )


def no_forward_mode(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError if a tensor carries a forward-mode tangent, which would be lost."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "fastgrpo has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad): use "
            "backward or torch.autograd.grad"
        )


def tensor(
    name: str,
    x: object,
    shape: tuple[int, ...] | None = None,
    like: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Raise ValueError unless x is a tensor of this shape, on the device of `like`, of a dtype."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":
        raise ValueError(
            f"{name}: expected a plain tensor, got a DTensor; gather it with {name}.full_tensor("
            f"grad_placements=[Partial('avg')] * {name}.device_mesh.ndim), or its gradient is not "
            "reduced"
        )
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"one of layout {x.layout}"
        raise ValueError(f"{name}: expected a dense tensor, got {kind}")
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {x.device}")
    if dtypes is not None and x.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {_names(dtypes)}, got {x.dtype}")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


def finite(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """Return a number within [low, high] as a float. Losses compute in fp32: it is finite there."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Comparisons alone: `torch.compile` traces numbers that change, and no function of math.
    if not is_number or not -math.inf < value < math.inf or not low <= value <= high:
        bounds = "" if low == -math.inf and high == math.inf else f" in [{low}, {high}]"
        raise ValueError(f"{name}: expected a finite number{bounds}, got {value!r}")
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name}: expected a number that fp32 can hold, got {value!r}")
    return float(value)


def positive(name: str, value: object) -> None:
    """Raise ValueError unless a number and its inverse are positive and finite in fp32."""
    if finite(name, value) <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    if not SMALLEST <= value <= 1 / SMALLEST:
        raise ValueError(
            f"{name}: expected a number whose inverse fp32 can hold, from {SMALLEST:.3g} to "
            f"{1 / SMALLEST:.3g}; got {value!r}"
        )


def share(name: str, value: object) -> None:
    if not 0 < finite(name, value) <= 1:
        raise ValueError(f"{name}: expected a share in (0, 1], got {value!r}")


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> None:
    """Check the operands of the logits: hidden (..., H), weight (V, H), bias (V,)."""
    allowed = FLOATS[:-1] if backend == "triton" else FLOATS
    tensor("hidden", hidden, dtypes=allowed)
    if hidden.dim() < 2 or not hidden.shape[-1]:
        raise ValueError(f"hidden: expected shape (..., H), H >= 1, got {tuple(hidden.shape)}")
    tensor("weight", weight, like=hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        hint = " (an empty weight is a shard that was not gathered)" if not weight.numel() else ""
        raise ValueError(
            f"weight: expected shape (V, {hidden.shape[-1]}) as hidden is {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}{hint}"
        )
    same = (hidden.dtype,)
    if hidden.dtype in (torch.bfloat16, torch.float16):
        same += (torch.float32,)
    tensor("weight", weight, dtypes=same)
    if bias is not None:
        tensor("bias", bias, (weight.shape[0],), like=hidden, dtypes=same)


def lora(lora: object, hidden: Tensor, weight: Tensor, sparsity: float) -> None:
    """Check an adapter (A, B) of the head, A (R, H) and B (V, R)."""
    if lora is None:
        return
    if not isinstance(lora, tuple) or len(lora) != 2:
        raise ValueError(f"lora: expected a tuple (A, B), got {type(lora).__name__}")
    a, b = lora
    same = (hidden.dtype, torch.float32) if hidden.dtype.itemsize == 2 else (hidden.dtype,)
    tensor("lora[0]", a, like=hidden, dtypes=same)
    if a.dim() != 2 or a.shape[1] != weight.shape[1] or not a.shape[0]:
        raise ValueError(f"lora[0]: expected shape (R, {weight.shape[1]}), got {tuple(a.shape)}")
    tensor("lora[1]", b, (weight.shape[0], a.shape[0]), like=hidden, dtypes=same)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: expected a frozen weight with lora, got one with requires_grad")
    if sparsity:
        raise ValueError(f"sparsity: expected 0 with lora, got {sparsity}")


def transform(logit_scale: float, softcap: float | None, workspace_mb: float | None) -> None:
    finite("logit_scale", logit_scale)
    if softcap is not None:
        positive("softcap", softcap)
    if workspace_mb is not None and finite("workspace_mb", workspace_mb) <= 0:
        raise ValueError(f"workspace_mb: expected a number of MiB > 0, got {workspace_mb}")


def temperature(value: object, shape: tuple[int, ...], like: Tensor) -> None:
    """Check a temperature: a number > 0, or a tensor () or per token whose values the op checks."""
    if isinstance(value, Tensor):
        tensor("temperature", value, shape if value.dim() else (), like=like, dtypes=FLOATS)
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "temperature: expected a tensor without requires_grad, as it gets no gradient"
            )
    else:
        positive("temperature", value)


def positive_temperature(values: Tensor) -> None:
    """Raise ValueError if a token's temperature, or its inverse, is not positive and finite."""
    usable = (values >= SMALLEST) & (values <= 1 / SMALLEST)
    if looks_at_values(values) and len(bad := values[~usable]):
        raise ValueError(
            f"temperature: expected values > 0 at unmasked tokens, got {bad[0].item()}"
        )


def ignore_index(value: object) -> None:
    """Raise ValueError unless an id that stands for none is an int that int64 can hold."""
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {value!r}")


def token_ids(name: str, ids: Tensor, vocab: int) -> None:
    """Raise ValueError if an id is outside the vocabulary."""
    if looks_at_values(ids) and len(bad := ids[(ids < 0) | (ids >= vocab)]):
        raise ValueError(
            f"{name}: expected ids in [0, {vocab}) at unmasked tokens, got {bad[0].item()}"
        )


def kept_ids(ids: Tensor, vocab: int) -> None:
    """Raise ValueError if a kept id of an unmasked token is outside the vocabulary."""
    if looks_at_values(ids) and len(bad := ids[(ids < 0) | (ids >= vocab)]):
        raise ValueError(
            f"support: expected ids in [0, {vocab}) at unmasked tokens, got {bad[0].item()}"
        )


def within_support(name: str, ids: Tensor, inside: Tensor) -> None:
    """Raise ValueError if a token (n,) is not among the ids that it was drawn from."""
    if looks_at_values(ids) and len(bad := ids[~inside]):
        raise ValueError(
            f"{name}: expected ids within their support at unmasked tokens, got {bad[0].item()}, "
            "which its sampler cannot have drawn"
        )


def log_probs(name: str, values: Tensor) -> None:
    """Raise ValueError for probabilities: numbers of which none is at most 0."""
    if looks_at_values(values) and values.numel() and bool((values > 0).all()):
        raise ValueError(
            f"{name}: expected log-probs at unmasked tokens, at most 0; got positive numbers only"
        )


def bounds(cu_seqlens: object, like: Tensor) -> None:
    """Check the type of cu_seqlens (B + 1,), the bounds of packed sequences."""
    tensor("cu_seqlens", cu_seqlens, like=like, dtypes=(torch.int32, torch.int64))
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")


def bounds_values(cu: Tensor, n: int) -> None:
    """Raise ValueError unless cu starts at 0, never decreases and ends at n."""
    if looks_at_values(cu) and (cu[0] != 0 or cu[-1] != n or bool((cu.diff() < 0).any())):
        raise ValueError(
            f"cu_seqlens: expected a non-decreasing sequence from 0 to N = {n}, got {cu.tolist()}"
        )


def one_row_each(cu: Tensor, anywhere: bool = False) -> None:
    """Raise ValueError if B advantages for N = B rows could be one per sequence or one per row.

    `anywhere` looks at the values on a GPU too.
    """
    if (anywhere or looks_at_values(cu)) and bool((cu.diff() != 1).any()):
        raise ValueError(
            f"advantages: expected a shape that tells sequences from tokens, got {len(cu) - 1} for "
            f"as many of both (cu_seqlens {cu.tolist()}); leave out the empty sequences"
        )


def sparsity(value: float, seed: object) -> None:
    """Check the sparse backward's threshold, and the seed of any draw."""
    if finite("sparsity", value, 0.0) >= 1 or 0 < value < 1e-6:
        raise ValueError(f"sparsity: expected 0 or a number in [1e-6, 1), got {value}")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ValueError(f"seed: expected an int, got {seed!r}")
    if seed is not None and not -(2**62) <= seed < 2**62:
        raise ValueError(f"seed: expected an int of 63 bits, got {seed}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)
