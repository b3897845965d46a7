"""Log-probs on Hopper and Blackwell, with the exponentials that their gradient needs: 2NVH.

The chosen token's logit is one dot product, and is computed first. It anchors the softmax: every
exponential is final as soon as its logit is, so no running maximum and no second pass is needed.
A persistent kernel multiplies tiles that TMA fetches and takes exp(z - anchor) on the fp32
accumulator. The sums go to a partial per row and tile. On request it also stores the exponentials
in a 16-bit tile, or marks the entries that a sparse backward draws in a bit mask. Rows whose sum
leaves the safe range are listed on the device and scored again by the portable kernel.
Mathematics: kernels/README.md.
"""

from __future__ import annotations

import contextvars
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .anchored_variant import anchored_launch
from .linear_logps import RowList, exps_of_rows, score_rows
from .logit_math import log1p_exp, softcapped, transform_logits
from .operands import Draw, Head, Logps, Rows, logit_arguments
from .runtime import (
    HAS_TRITON,
    INTERPRETED,
    LAUNCHES,
    Launch,
    architecture,
    jit,
    launch,
    launch_for,
    multiprocessors,
    tl,
    triton,
)

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

HEADROOM = 40.0  # nats from the target to the anchor: sums are safe for log-probs down to -109
PARTIALS_BYTES = 64 * 2**20
WORD = 32  # entries of the vocabulary per word of a mask


class Marks(NamedTuple):
    """Where to mark the entries that a draw keeps."""

    draw: Draw  # its anchor (fp32) replaces the one above the target's logit
    mask: Tensor  # (n, mask_words(V)) int32, output: `compact_mask` reads it

    def __getitem__(self, c: slice) -> Marks:  # type: ignore[override]
        return Marks(self.draw[c], self.mask[c])


class Anchored(NamedTuple):
    """The results of one pass over the logits, fp32 (n,), in nats."""

    scored: Logps
    log_scale: Tensor  # anchor - lse: p_v = exp(z_v - anchor) exp(log_scale); 0 where redone
    redone: Tensor  # bool: scored by the portable kernel; the row's mask is then meaningless

    def __getitem__(self, c: slice) -> Anchored:  # type: ignore[override]
        return Anchored(self.scored[c], self.log_scale[c], self.redone[c])


def mask_words(vocab_size: int) -> int:
    """Width of the mask of a `Marks`: enough for whole tiles of any launch entry."""
    return -(-vocab_size // 256) * 256 // WORD


def has_anchored(rows: Rows, head: Head) -> bool:
    """Whether `anchored_logps_fwd` takes these operands on this device.

    It needs 16-bit operands of one dtype, and a weight that TMA can address, without `Head.lora`.
    `hidden` is copied if TMA cannot address it: the choice of kernel must not depend on where the
    rows are in memory.
    """
    hidden, weight = rows.hidden, head.weight
    return (
        (16, architecture(hidden.device)) in LAUNCHES["anchored_logps"]
        and head.lora is None
        and hidden.dtype == weight.dtype
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[1] % 8 == 0
        and _addressable(weight)
    )


def _addressable(x: Tensor) -> bool:
    """Whether TMA can address x: rows of adjacent columns that begin at multiples of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.stride(1) == 1 and x.numel() > 0


@jit(do_not_specialize=["N"])
def _anchor_rows_kernel(
    # inputs: (N, H), (V, H), (N,) int64, (V,) or None, (N,) fp32 or None
    hidden_ptr,
    weight_ptr,
    ids_ptr,
    bias_ptr,
    inv_temperature_ptr,
    # outputs, (N,) fp32; the second may be None
    target_ptr,
    anchor_ptr,
    N,
    V,
    H,
    stride_hidden,
    stride_weight,
    logit_scale,
    softcap,
    headroom,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The logit of each row's token, NaN for an id outside [0, V), and the anchor above it."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    ids = tl.load(ids_ptr + rows, mask=inside, other=0)
    valid = (ids >= 0) & (ids < V)
    mask = (inside & valid)[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for start in range(0, H, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)[None, :]
        h = tl.load(hidden_ptr + rows[:, None] * stride_hidden + offs_h, mask=mask & (offs_h < H),
                    other=0.0)  # fmt: skip
        w = tl.load(weight_ptr + ids[:, None] * stride_weight + offs_h, mask=mask & (offs_h < H),
                    other=0.0)  # fmt: skip
        sums += h.to(tl.float32) * w.to(tl.float32)
    z0 = tl.sum(sums, 1)
    if bias_ptr is not None:
        z0 += tl.load(bias_ptr + ids, mask=inside & valid, other=0.0).to(tl.float32)
    inv_temperature = 1.0
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + rows, mask=inside, other=1.0)
    z, _ = transform_logits(z0, logit_scale, softcap, inv_temperature, SOFTCAP)
    z = tl.where(valid, z, float("nan"))
    tl.store(target_ptr + rows, z, mask=inside)
    if anchor_ptr is not None:
        tl.store(anchor_ptr + rows, z + headroom, mask=inside)


@jit(do_not_specialize=["N"])
def _anchored_logps_kernel(
    # inputs: descriptors of (N, H) and (V, H); (N,) int64, (V,) or None, (N,) fp32 or None, (N,)
    hidden,  # where warps are specialised, the tensor
    weight,
    ids_ptr,
    bias_ptr,
    inv_temperature_ptr,
    anchor_ptr,
    # (V,) int32, (N,) int32, or None
    column_words_ptr,
    row_words_ptr,
    # outputs: (1 or 2, tiles, N) fp32, a descriptor of (N, V) or None, (N, words) int32 or None
    partials_ptr,
    exps,
    mask_ptr,
    N,
    V,
    stride_hidden,
    stride_mask,
    logit_scale,
    softcap,
    H: tl.constexpr,
    RAGGED_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """For each tile: sums of e = exp(z - anchor) over all columns except the target's, and e."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if WARP_SPECIALIZE:
        # Each consumer takes half of the rows. The compiler can split the block of a descriptor
        # made on the device, but not of one that comes from the host.
        hidden = tl.make_tensor_descriptor(hidden, [N, H], [stride_hidden, 1], [BLOCK_N, BLOCK_H])
    blocks_n = tl.cdiv(N, BLOCK_N)
    tiles_v = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(
        tl.program_id(0), blocks_n * tiles_v, tl.num_programs(0),
        flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE,
    ):  # fmt: skip
        # GROUP_N blocks of rows share the weight tiles in flight in L2.
        first = tile // (GROUP_N * tiles_v) * GROUP_N
        grouped = tl.minimum(blocks_n - first, GROUP_N)
        start_n = (first + tile % (GROUP_N * tiles_v) % grouped) * BLOCK_N
        tile_v = tile % (GROUP_N * tiles_v) // grouped
        start_v = tile_v * BLOCK_V
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start_h in range(0, H, BLOCK_H):
            h = hidden.load([start_n, start_h])
            w = weight.load([start_v, start_h])
            if UPCAST:
                h = h.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(h, w.T, z, input_precision="ieee")

        rows = start_n + tl.arange(0, BLOCK_N)
        inside = rows < N
        cols = tl.arange(0, BLOCK_V)
        scale = LOG2E
        if inv_temperature_ptr is not None:
            scale = (tl.load(inv_temperature_ptr + rows, mask=inside, other=1.0) * LOG2E)[:, None]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + start_v + cols, mask=start_v + cols < V, other=0.0)
            z += bias.to(tl.float32)[None, :]
        if SOFTCAP:
            z, _ = softcapped(z * logit_scale, softcap)
        else:
            scale *= logit_scale
        if RAGGED_V:
            padding = cols[None, :] >= V - start_v
            # Only the last tile has padding, but a branch would prevent warp specialisation.
            if WARP_SPECIALIZE:
                z = tl.where(padding, -1e30, z)
            elif start_v + BLOCK_V > V:
                z = tl.where(padding, -1e30, z)
        anchor = tl.load(anchor_ptr + rows, mask=inside, other=0.0) * LOG2E
        t = z * scale - anchor[:, None]
        if WITH_ENTROPY and bias_ptr is not None:
            # 2^-300 is 0 like 2^-inf, but 0 times -300 is 0 and not NaN. NaN stays NaN.
            t = tl.maximum(t, -300.0, propagate_nan=tl.PropagateNan.ALL)
        # 32 bits are enough for a position within the tile.
        index = (tl.load(ids_ptr + rows, mask=inside, other=-1) - start_v).to(tl.int32)
        e = tl.where(cols[None, :] == index[:, None], 0.0, tl.exp2(t))
        partial_ptrs = partials_ptr + tile_v.to(tl.int64) * N + rows
        tl.store(partial_ptrs, tl.sum(e, 1), mask=inside)
        if WITH_ENTROPY:
            tl.store(partial_ptrs + tl.cast(tiles_v, tl.int64) * N, tl.sum(e * t, 1), mask=inside)
        if exps is not None:
            if SOFTCAP:
                # Recomputed from t: keeping the slope until here would take too many registers.
                tanh = (t + anchor[:, None]) * (1.0 / (scale * softcap))
                e *= 1.0 - tanh * tanh
            exps.store([start_n, start_v], e.to(exps.dtype))
        if mask_ptr is not None:
            words = tl.load(column_words_ptr + start_v + cols, mask=start_v + cols < V, other=0)
            word = tl.load(row_words_ptr + rows, mask=inside, other=0)
            # 23 bits as the mantissa of a number in [1, 2): exact, without a conversion.
            bits = (words[None, :] ^ word[:, None]) | 0x3F800000
            marked = e > bits.to(tl.float32, bitcast=True) - 1.0
            # A word takes the entries of a row that one thread holds: 16 pairs of columns, 8 apart.
            bit = (1 << (cols // 8 % 16 * 2 + cols % 2))[None, :]
            marks = tl.reshape(tl.where(marked, bit, 0), [BLOCK_N, BLOCK_V // 128, 16, 4, 2])
            packed = tl.reshape(tl.sum(tl.sum(marks, 4), 2), [BLOCK_N, BLOCK_V // 32])
            offs_w = start_v // 32 + tl.arange(0, BLOCK_V // 32)
            mask_ptrs = mask_ptr + rows[:, None].to(tl.int64) * stride_mask + offs_w[None, :]
            tl.store(mask_ptrs, packed, mask=inside[:, None])


@jit(do_not_specialize=["N"])
def _finish_anchored_kernel(
    # inputs: (1 or 2, T, N), (N,), (N,), fp32
    partials_ptr,
    target_ptr,
    anchor_ptr,
    # outputs, (N,) fp32, and bool
    logps_ptr,
    lse_ptr,
    entropy_ptr,  # or None
    log_scale_ptr,
    redone_ptr,
    N,
    T,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some rows: sum their partials in order, and mark the rows whose sum cannot be trusted."""
    LN2: tl.constexpr = 0.6931471805599453
    LARGEST: tl.constexpr = 1.2676506e30  # 2^100: gradients multiply by the sum's inverse
    SMALLEST: tl.constexpr = 8.6736174e-19  # 2^-60: V underflowed terms are negligible beside it
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    target = tl.load(target_ptr + rows, mask=inside, other=0.0)
    anchor = tl.load(anchor_ptr + rows, mask=inside, other=0.0)
    partials_ptr += rows[None, :]
    total = tl.zeros([BLOCK_N], tl.float32)
    lost = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, T, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)[:, None]
        mask = (tiles < T) & inside[None, :]
        s = tl.load(partials_ptr + tiles.to(tl.int64) * N, mask=mask, other=0.0)
        # Kahan summation: there are hundreds of partials, and the entropy multiplies their error
        # by 40.
        part = tl.sum(s, 0) - lost
        longer = total + part
        lost = (longer - total) - part
        total = longer
    logps = -log1p_exp(tl.log(total) + (anchor - target))
    log_scale = (anchor - target) + logps
    own = tl.exp(target - anchor)
    trusted = (total <= LARGEST) & ((total >= SMALLEST) | (own >= SMALLEST))
    trusted &= tl.abs(target) < float("inf")
    if entropy_ptr is not None:
        # -sum p log p with log p_v = (z_v - anchor) + log_scale. Both terms are large and nearly
        # cancel, so they are added tile by tile.
        surprise = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, T, BLOCK_T):
            tiles = start + tl.arange(0, BLOCK_T)[:, None]
            mask = (tiles < T) & inside[None, :]
            partial_ptrs = partials_ptr + tiles.to(tl.int64) * N
            s = tl.load(partial_ptrs, mask=mask, other=0.0)
            d = tl.load(partial_ptrs + tl.cast(T, tl.int64) * N, mask=mask, other=0.0)
            surprise -= tl.sum(d * LN2 + s * log_scale[None, :], 0)
        # total + own is exp(-log_scale), without the rounding of a log_scale of tens of nats.
        entropy = surprise / (total + own) - tl.exp(logps) * logps
        trusted &= entropy == entropy
        tl.store(entropy_ptr + rows, tl.maximum(entropy, 0.0), mask=inside)
    tl.store(logps_ptr + rows, logps, mask=inside)
    tl.store(lse_ptr + rows, target - logps, mask=inside)
    tl.store(log_scale_ptr + rows, tl.where(trusted, log_scale, 0.0), mask=inside)
    tl.store(redone_ptr + rows, trusted == 0, mask=inside)


@jit(do_not_specialize=["N"])
def _list_rows_kernel(
    marked_ptr,  # (N,) bool
    # outputs: (N,) and (1,) int32
    index_ptr,
    count_ptr,
    N,
    BLOCK_N: tl.constexpr,
):
    """The marked rows in ascending order, and their count. One program."""
    count = tl.zeros([1], tl.int32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        marked = tl.load(marked_ptr + rows, mask=rows < N, other=0).to(tl.int32)
        places = count + tl.cumsum(marked, 0) - marked
        tl.store(index_ptr + places, rows, mask=marked != 0)
        count += tl.sum(marked, 0)
    tl.store(count_ptr + tl.arange(0, 1), count)


def anchored_logps_fwd(
    rows: Rows,  # hidden bf16 | fp16, inv_temperature fp32
    head: Head,  # weight in hidden's dtype
    with_entropy: bool,
    *,
    exps: Tensor | None = None,  # output, (n, V) bf16: rows begin at multiples of 16 bytes
    marks: Marks | None = None,
) -> Anchored:
    """Return the scores of the rows, as `linear_logps_fwd` does. Requires `has_anchored`.

    With `exps`, p_v = exps_v exp(log_scale) for every v except the target, where exps is 0. Under a
    softcap this is p_v times the derivative of the capping. exps is bf16: fp16 would overflow.
    Scratch: at most 64 MiB, and 12 or 16 bytes per row and 4096 vocabulary entries.
    """
    if exps is not None:
        assert exps.dtype == torch.bfloat16 and _addressable(exps), "exps: bf16, aligned rows"
    if not _addressable(rows.hidden):
        rows = rows._replace(hidden=rows.hidden.clone(memory_format=torch.contiguous_format))
    n, vocab_size = len(rows.ids), len(head.weight)
    entry = anchored_launch(rows.hidden, scores_only=exps is None and marks is None)
    tiles = -(-vocab_size // entry.blocks["BLOCK_V"])
    at_once = max(1, PARTIALS_BYTES // (4 * (1 + with_entropy) * tiles))

    def new(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(n, dtype=dtype, device=rows.hidden.device)

    if exps is not None and rows.inv_temperature is None:
        # A factor per row: with one factor for all rows the compiler spills in some modes.
        ones = torch.ones(n, dtype=torch.float32, device=rows.hidden.device)
        rows = rows._replace(inv_temperature=ones)
    scored = Logps(new(), new(), new() if with_entropy else None)
    result = Anchored(scored, new(), new(torch.bool))
    store = exps
    if INTERPRETED and exps is not None:
        # It truncates where hardware rounds to nearest: PyTorch rounds instead.
        store = torch.empty_strided(exps.shape, exps.stride(), dtype=torch.float32)
    for start in range(0, n, at_once):
        c = slice(start, start + at_once)
        stored, marked = (None if x is None else x[c] for x in (store, marks))
        _score(entry, rows[c], head, stored, marked, result[c])
    if store is not exps:
        exps.copy_(store)
    return result


def _score(
    entry: Launch,
    rows: Rows,
    head: Head,
    exps: Tensor | None,
    marks: Marks | None,
    result: Anchored,
) -> None:
    """Write the results of rows that share one buffer of partials."""
    n, device = len(rows.ids), rows.hidden.device
    target = torch.empty_like(result.log_scale)
    anchor = torch.empty_like(target) if marks is None else marks.draw.anchor
    first, finish, listing = (
        launch_for(name, 0, architecture(device))
        for name in ("anchor_rows", "finish_anchored", "list_rows")
    )
    launch(
        _anchor_rows_kernel,
        (-(-n // first.blocks["BLOCK_N"]),),
        first,
        device,
        **logit_arguments(rows, head),
        target_ptr=target,
        anchor_ptr=anchor if marks is None else None,
        headroom=HEADROOM,
    )
    with_entropy = result.scored.entropy is not None
    partials, _ = _sum_tiles(entry, rows, head, anchor, with_entropy, exps, marks)
    launch(
        _finish_anchored_kernel,
        (-(-n // finish.blocks["BLOCK_N"]),),
        finish,
        device,
        partials_ptr=partials,
        target_ptr=target,
        anchor_ptr=anchor,
        logps_ptr=result.scored.logps,
        lse_ptr=result.scored.lse,
        entropy_ptr=result.scored.entropy,
        log_scale_ptr=result.log_scale,
        redone_ptr=result.redone,
        N=n,
        T=partials.shape[1],
    )
    some = RowList(*(torch.empty(k, dtype=torch.int32, device=device) for k in (n, 1)))
    launch(
        _list_rows_kernel,
        (1,),
        listing,
        device,
        marked_ptr=result.redone,
        index_ptr=some.index,
        count_ptr=some.count,
        N=n,
    )
    score_rows(rows, head, result.scored, some)
    if exps is not None:
        exps_of_rows(rows, head, result.scored.lse, exps, some)


def _sum_tiles(
    entry: Launch,
    rows: Rows,
    head: Head,
    anchor: Tensor,
    with_entropy: bool,
    exps: Tensor | None = None,
    marks: Marks | None = None,
) -> tuple[Tensor, Any]:
    """Return the partial sums (1 or 2, tiles, n), and the kernel that made them."""
    hidden, device = rows.hidden, rows.hidden.device
    n, vocab_size = len(rows.ids), len(head.weight)
    block_n, block_v, block_h = (entry.blocks[x] for x in ("BLOCK_N", "BLOCK_V", "BLOCK_H"))
    tiles = -(-vocab_size // block_v)
    draw, mask = (None, None) if marks is None else marks
    assert mask is None or mask.shape[1] * WORD >= tiles * block_v, "mask: whole tiles"
    partials = torch.empty((1 + with_entropy, tiles, n), dtype=torch.float32, device=device)
    specialised = entry.blocks["WARP_SPECIALIZE"]
    programs = min(-(-n // block_n) * tiles, multiprocessors(device))

    def run() -> Any:
        if specialised:
            triton.set_allocator(
                lambda size, *_: torch.empty(size, dtype=torch.int8, device=device)
            )
        return launch(
            _anchored_logps_kernel,
            (programs,),
            entry,
            device,
            hidden=hidden
            if specialised
            else TensorDescriptor.from_tensor(hidden, [block_n, block_h]),
            weight=TensorDescriptor.from_tensor(head.weight, [block_v, block_h]),
            ids_ptr=rows.ids,
            bias_ptr=head.bias,
            inv_temperature_ptr=rows.inv_temperature,
            anchor_ptr=anchor,
            column_words_ptr=None if draw is None else draw.column_words,
            row_words_ptr=None if draw is None else draw.row_words,
            partials_ptr=partials,
            exps=None if exps is None else TensorDescriptor.from_tensor(exps, [block_n, block_v]),
            mask_ptr=mask,
            N=n,
            V=vocab_size,
            stride_hidden=hidden.stride(0),
            stride_mask=0 if mask is None else mask.stride(0),
            # Padding (-1e30) vanishes only under a positive factor. Otherwise NaN makes every row
            # be scored again.
            logit_scale=head.logit_scale if head.logit_scale > 0 else float("nan"),
            softcap=head.softcap,
            H=hidden.shape[1],
            RAGGED_V=vocab_size % block_v != 0,
            SOFTCAP=head.softcap != 0.0,
            WITH_ENTROPY=with_entropy,
            UPCAST=INTERPRETED,
        )

    # Descriptors made on the device need an allocator. It is set in a copy of the context, so
    # that the caller's stays as it is.
    return partials, contextvars.copy_context().run(run)
