"""Errors that name the argument, what was expected and what came.

Shapes, dtypes and devices are always checked. Looking at *values* (token ids in range, temperatures
above zero) would make a GPU wait for the host: it is done on CPUs, and on GPUs inside `checked()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastgrpo.config import LossConfig
from fastgrpo.values import finite
from fastgrpo_kernels.runtime import HAS_TRITON

_values_checked_on_gpu = False


@contextlib.contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Within this context values are checked on GPUs too, which makes the host wait for them."""
    global _values_checked_on_gpu
    before, _values_checked_on_gpu = _values_checked_on_gpu, enabled
    try:
        yield
    finally:
        _values_checked_on_gpu = before


def looks_at_values(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or _values_checked_on_gpu


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
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {x.device}")
    if dtypes is not None and x.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {_names(dtypes)}, got {x.dtype}")


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> None:
    """Check the operands of the logits: hidden (..., H), weight (V, H), bias (V,)."""
    kernels = backend == "triton"
    if backend == "auto" and HAS_TRITON:
        kernels = isinstance(hidden, Tensor) and hidden.is_cuda
    allowed = FLOATS[:-1] if kernels else FLOATS
    tensor("hidden", hidden, dtypes=allowed)
    if hidden.dim() < 2:
        raise ValueError(f"hidden: expected shape (..., H), got {tuple(hidden.shape)}")
    tensor("weight", weight, like=hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        hint = " (an empty weight is a shard that was not gathered)" if not weight.numel() else ""
        raise ValueError(
            f"weight: expected shape (V, {hidden.shape[-1]}) as hidden is {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}{hint}"
        )
    if type(weight).__name__ == "DTensor":
        raise ValueError(
            "weight: expected a plain tensor, got a DTensor; gather it with "
            "full_tensor(grad_placements=[Partial('avg')]), or its gradient is not reduced"
        )
    same = (hidden.dtype,)
    if hidden.dtype in (torch.bfloat16, torch.float16):
        same += (torch.float32,)
    tensor("weight", weight, dtypes=same)
    if bias is not None:
        tensor("bias", bias, (weight.shape[0],), like=hidden, dtypes=same)


def transform(logit_scale: float, softcap: float | None, workspace_mb: float | None) -> None:
    finite("logit_scale", logit_scale)
    if softcap is not None and finite("softcap", softcap) <= 0:
        raise ValueError(f"softcap: expected a number > 0, or None for no cap; got {softcap}")
    if workspace_mb is not None and finite("workspace_mb", workspace_mb) <= 0:
        raise ValueError(f"workspace_mb: expected a number of MiB > 0, got {workspace_mb}")


def temperature(value: object, shape: tuple[int, ...], like: Tensor) -> None:
    """Check a temperature: a number > 0, or a tensor () or per token whose values the op checks."""
    if isinstance(value, Tensor):
        tensor("temperature", value, shape if value.dim() else (), like=like, dtypes=FLOATS)
    elif finite("temperature", value) <= 0:
        raise ValueError(f"temperature: expected a number > 0, got {value}")


def positive_temperature(values: Tensor) -> None:
    """Raise ValueError if a token's temperature is not finite and above zero."""
    if looks_at_values(values) and len(bad := values[~((values > 0) & values.isfinite())]):
        raise ValueError(
            f"temperature: expected values > 0 at unmasked tokens, got {bad[0].item()}"
        )


def token_ids(name: str, ids: Tensor, vocab: int) -> None:
    """Raise ValueError if an id is outside the vocabulary."""
    if looks_at_values(ids) and len(bad := ids[(ids < 0) | (ids >= vocab)]):
        raise ValueError(
            f"{name}: expected ids in [0, {vocab}) at unmasked tokens, got {bad[0].item()}"
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


def one_row_each(cu: Tensor) -> None:
    """Raise ValueError if B advantages for N = B rows could be one per sequence or one per row."""
    if looks_at_values(cu) and bool((cu.diff() != 1).any()):
        raise ValueError(
            f"advantages: expected a shape that tells sequences from tokens, got {len(cu) - 1} for "
            f"as many of both (cu_seqlens {cu.tolist()}); leave out the empty sequences"
        )


def loss_options(
    config: object,
    like: Tensor,
    old_logps: object,
    ref_logps: object,
    sampler_logps: object,
    groups: object,
    entropy_threshold: object,
    normalizer: object,
    seed: object,
    sparsity: float,
    skip_zero_advantage: bool,
) -> None:
    """Check what the loss needs from the call, and that the call gives it nothing else."""
    if not isinstance(config, LossConfig):
        raise ValueError(f"config: expected a preset's name or a LossConfig, got {config!r}")
    if config.beta and ref_logps is None:
        raise ValueError(f"ref_logps: expected log-probs as beta is {config.beta}, got None")
    for name, value in (("correction", config.correction), ("rejection", config.rejection)):
        if value != "none" and sampler_logps is None:
            raise ValueError(f"sampler_logps: expected log-probs as {name} is {value!r}, got None")
    if config.off_policy_mask_threshold is not None and old_logps is sampler_logps is None:
        raise ValueError("off_policy_mask_threshold has no effect without old_logps, sampler_logps")
    if (groups is None) == (config.aggregation == "prompt_mean"):
        if groups is not None:
            raise ValueError(
                f"group_ids_or_size has no effect with aggregation={config.aggregation!r}"
            )
        raise ValueError(
            "group_ids_or_size: expected ids or a size as aggregation is 'prompt_mean', got None"
        )
    if skip_zero_advantage and not config.zero_advantage_is_inert:
        raise ValueError(
            "skip_zero_advantage: expected a loss that tokens with advantage 0 have no part in, "
            "got one with statistics of sequences or of the batch, a KL term or an entropy bonus"
        )
    if skip_zero_advantage and (config.entropy == "differentiable"):
        raise ValueError("skip_zero_advantage has no effect with entropy='differentiable'")
    if skip_zero_advantage and config.corrects_sequences and old_logps is None:
        raise ValueError("skip_zero_advantage: expected old_logps beside a sequence's correction")
    scalar("entropy_threshold", entropy_threshold, like)
    if entropy_threshold is not None and config.top_entropy_quantile == 1:
        raise ValueError("entropy_threshold has no effect with top_entropy_quantile=1")
    scalar("normalizer", normalizer, like)
    if isinstance(normalizer, (int, float)) and normalizer <= 0:
        raise ValueError(f"normalizer: expected a number > 0, got {normalizer}")
    if normalizer is not None and config.aggregation == "token_sum":
        raise ValueError("normalizer has no effect with aggregation='token_sum'")
    if config.aggregation == "fixed_length" and normalizer is None:
        if config.max_completion_length is None:
            raise ValueError(
                "max_completion_length: expected a length in the LossConfig, or a normalizer, for "
                "aggregation='fixed_length'; got neither"
            )
    if seed is not None and config.surrogate != "clip_cov" and not sparsity:
        raise ValueError(
            f"seed has no effect with surrogate={config.surrogate!r} and sparsity=0: nothing is "
            "drawn"
        )


def scalar(name: str, value: object, like: Tensor) -> None:
    """Check an optional number that may be a tensor ()."""
    if isinstance(value, Tensor):
        tensor(name, value, (), like=like)
    elif value is not None:
        finite(name, value)


def groups(given: object, sequences: int, like: Tensor) -> Tensor | None:
    """Return the group (B,) int64 of each sequence, given ids or the size of adjacent groups."""
    if given is None:
        return None
    if isinstance(given, Tensor):
        tensor("group_ids_or_size", given, (sequences,), like=like, dtypes=(torch.int64,))
        return given
    if not isinstance(given, int) or isinstance(given, bool) or given < 1 or sequences % given:
        raise ValueError(
            f"group_ids_or_size: expected a divisor of the {sequences} completions, or a tensor of "
            f"ids; got {given!r}"
        )
    return torch.arange(sequences, device=like.device) // given


def sparsity(value: float, seed: object) -> None:
    """Check the sparse backward's threshold and seed."""
    if finite("sparsity", value, 0.0) >= 1 or 0 < value < 1e-6:
        raise ValueError(f"sparsity: expected 0 or a number in [1e-6, 1), got {value}")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ValueError(f"seed: expected an int, got {seed!r}")
    if value and seed is not None and not -(2**62) <= seed < 2**62:
        raise ValueError(f"seed: expected an int of 63 bits, got {seed}")


def positive_normalizer(value: Tensor) -> None:
    if looks_at_values(value) and not (value > 0 and value.isfinite()):
        raise ValueError(f"normalizer: expected a number > 0, got {value.item()}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)
