"""Log-probs, log-sum-exp and entropy of a linear head without logits: 2NVH, O(N) numbers written.

A program multiplies a block of rows with one split of the vocabulary, tile by tile, and folds each
tile's logits into the running softmax of its rows while they are in registers. The splits depend
on the vocabulary alone, and a second kernel merges them in order: a row's bits depend neither on
how many rows there are nor on which of them it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .logit_math import merge_stats, slice_index, softmax_stats, transform_logits
from .runtime import (
    INTERPRETED,
    architecture,
    device_of,
    dot_precision,
    jit,
    launch_for,
    tl,
)


@jit
def _grouped_program(N, V, BLOCK_N: tl.constexpr, SPLIT_V: tl.constexpr, GROUP_N: tl.constexpr):
    """(row block, split) of this program: GROUP_N row blocks share the splits in flight in L2."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(N, BLOCK_N)
    group_size = GROUP_N * tl.cdiv(V, SPLIT_V)
    first = program // group_size * GROUP_N
    rows = tl.minimum(row_blocks - first, GROUP_N)
    return first + program % group_size % rows, program % group_size // rows


@jit(do_not_specialize=["N"])
def _linear_logps_kernel(
    # inputs: (N, H), (V, H), (N,) int64, (V,) or None, (N,) fp32 or None
    hidden_ptr,
    weight_ptr,
    ids_ptr,
    bias_ptr,
    inv_temperature_ptr,
    # output: (3 or 4, splits, N) fp32: max, sum, target, dot
    partials_ptr,
    N,
    V,
    H,
    stride_hidden,
    stride_weight,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    RAGGED_H: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT_V: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """One block of rows, one split of the vocabulary: softmax statistics and the target's logit."""
    row_block, split = _grouped_program(N, V, BLOCK_N, SPLIT_V, GROUP_N)
    rows = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = rows[:, None] < N
    ids = tl.load(ids_ptr + rows, mask=rows < N, other=-1)
    inv_temperature = 1.0
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + rows, mask=rows < N, other=1.0)[:, None]
    index = slice_index(ids, 0, V)

    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    d = tl.zeros([BLOCK_N], tl.float32)
    target = tl.zeros([BLOCK_N], tl.float32)
    for start in range(split * SPLIT_V, tl.minimum(V, (split + 1) * SPLIT_V), BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        inside_v = offs_v[:, None] < V
        hidden_ptrs = hidden_ptr + rows[:, None] * stride_hidden
        weight_ptrs = weight_ptr + offs_v[:, None].to(tl.int64) * stride_weight
        z0 = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start_h in range(0, H, BLOCK_H):
            offs_h = start_h + tl.arange(0, BLOCK_H)[None, :]
            mask_n, mask_v = inside_n, inside_v
            if RAGGED_H:
                mask_n, mask_v = inside_n & (offs_h < H), inside_v & (offs_h < H)
            h = tl.load(hidden_ptrs + offs_h, mask=mask_n, other=0.0)
            w = tl.load(weight_ptrs + offs_h, mask=mask_v, other=0.0)
            if UPCAST:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            z0 = tl.dot(h, tl.trans(w), z0, input_precision=PRECISION)
        if bias_ptr is not None:
            z0 += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
        z, _ = transform_logits(z0, logit_scale, softcap, inv_temperature, SOFTCAP)
        z = tl.where(offs_v[None, :] < V, z, float("-inf"))
        target += tl.sum(tl.where(offs_v[None, :] == index[:, None], z, 0.0), 1)
        m2, s2, d2 = softmax_stats(z, WITH_ENTROPY)
        m, s, d = merge_stats(m, s, d, m2, s2, d2)

    partials_ptr += split.to(tl.int64) * N + rows
    stride_stat = tl.cdiv(V, SPLIT_V).to(tl.int64) * N
    tl.store(partials_ptr, m, mask=rows < N)
    tl.store(partials_ptr + stride_stat, s, mask=rows < N)
    tl.store(partials_ptr + 2 * stride_stat, target, mask=rows < N)
    if WITH_ENTROPY:
        tl.store(partials_ptr + 3 * stride_stat, d, mask=rows < N)


@jit(do_not_specialize=["N"])
def _merge_splits_kernel(
    # inputs: (3 or 4, splits, N) fp32, (N,) int64
    partials_ptr,
    ids_ptr,
    # outputs, (N,) fp32
    logps_ptr,
    lse_ptr,
    entropy_ptr,  # or None
    N,
    V,
    SPLIT_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merge the splits' statistics in order; the target comes from the split that owns it."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    splits = tl.cdiv(V, SPLIT_V)
    stride_stat = splits.to(tl.int64) * N
    partials_ptr += rows
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    d = tl.zeros([BLOCK_N], tl.float32)
    for split in range(0, splits):
        split_ptr = partials_ptr + tl.cast(split, tl.int64) * N
        m2 = tl.load(split_ptr, mask=inside, other=float("-inf"))
        s2 = tl.load(split_ptr + stride_stat, mask=inside, other=0.0)
        d2 = tl.zeros_like(s2)
        if entropy_ptr is not None:
            d2 = tl.load(split_ptr + 3 * stride_stat, mask=inside, other=0.0)
        m, s, d = merge_stats(m, s, d, m2, s2, d2)

    ids = tl.load(ids_ptr + rows, mask=inside, other=-1)
    valid = (ids >= 0) & (ids < V)
    owner = tl.where(valid, ids // SPLIT_V, 0)
    target = tl.load(partials_ptr + 2 * stride_stat + owner * N, mask=inside & valid, other=0.0)
    log_sum = tl.log(s)
    # Not target - lse: this order is exact at the maximum and never above 0.
    logps = tl.where(valid, (target - m) - log_sum, float("nan"))
    tl.store(logps_ptr + rows, logps, mask=inside)
    tl.store(lse_ptr + rows, m + log_sum, mask=inside)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + rows, log_sum - d / s, mask=inside)


def linear_logps_fwd(
    hidden: Tensor,  # (n, H) bf16 | fp16 | fp32
    weight: Tensor,  # (V, H) dtype of hidden, or fp32
    ids: Tensor,  # (n,) int64
    bias: Tensor | None,  # (V,)
    inv_temperature: Tensor | None,  # (n,) fp32, None: 1
    logit_scale: float,
    softcap: float,  # 0.0: off
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return logps (n,), lse (n,) and entropy (n,) or None, fp32, in nats.

    Rows may be strided; columns that are not adjacent cost one copy. The logps of a row whose id is
    not in [0, V) is NaN. Scratch: 12 or 16 bytes per row and split of 4096 vocabulary entries.
    """
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    n, hidden_size = hidden.shape
    vocab_size = weight.shape[0]
    same_dtype = hidden.dtype == weight.dtype
    bits = 32 if hidden.dtype == torch.float32 or not same_dtype else 16
    arch = architecture(hidden.device)
    launch = launch_for("linear_logps", bits, arch)
    ragged = hidden_size % launch.blocks["BLOCK_H"] != 0
    if ragged:
        launch = launch_for("linear_logps_ragged_h", bits, arch)
    merge = launch_for("merge_splits", 0, arch)
    blocks, split_size = -(-n // launch.blocks["BLOCK_N"]), launch.blocks["SPLIT_V"]
    splits = -(-vocab_size // split_size)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    logps, lse, entropy = new(n), new(n), new(n) if with_entropy else None
    partials = new(3 + with_entropy, splits, n)
    with device_of(hidden):
        if n:
            _linear_logps_kernel[(blocks * splits,)](
                *(hidden, weight, ids, bias, inv_temperature, partials),
                *(n, vocab_size, hidden_size, hidden.stride(0), weight.stride(0)),
                *(logit_scale, softcap),
                SOFTCAP=softcap != 0.0,
                WITH_ENTROPY=with_entropy,
                # The interpreter multiplies 16-bit floats as the integers that hold them.
                RAGGED_H=ragged,
                UPCAST=INTERPRETED or not same_dtype,
                PRECISION=dot_precision(bits),
                **launch.kwargs(),
            )
            _merge_splits_kernel[(-(-n // merge.blocks["BLOCK_N"]),)](
                *(partials, ids, logps, lse, entropy, n, vocab_size),
                SPLIT_V=split_size,
                **merge.kwargs(),
            )
    return logps, lse, entropy
