"""What drawing entries costs a forward kernel: `python -m benchmarks.sparse_epilogues`.

A persistent GEMM whose tiles come by TMA, for Hopper, compiled and never run: registers, shared
memory and instructions of the ways to get the drawn entries out of it. The unbiased sparse backward
keeps an entry if e > u, e about p / tau, u uniform from a random word per column and one per row.

    append    ids go to slots of the row, an atomic counter tells which
    mask      a bit an entry, V/8 bytes a row
    count     a number per row and tile, whose tiles are computed again later

A prototype to choose by, no part of the package. Where each thread packs the columns that it
holds, entry v is bit `2 (v // 8 % 16) + v % 2` of word `4 (v // 128) + v // 2 % 4`.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl

from benchmarks.compiling import PARTS, Case, compile_case, tool, usage
from benchmarks.environment import RESULTS, now, write_record
from fastgrpo_kernels.runtime import Launch

RECORD = RESULTS / "sparse-epilogues.json"
HIDDEN, VOCAB, KEPT = 3584, 151_936, 46
MULTIPROCESSORS = 132


# Uniform numbers in [0, 1), from random words: `a` of the columns, `b` of the rows.


@triton.jit
def sum_uniform(a, b):
    """23 bits each, added modulo 2^23 and put into the mantissa of a number in [1, 2)."""
    return (((a + b) & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def wrapping_sum_uniform(a, b):
    """32 bits each: the addition wraps by itself, and the upper 23 bits are used."""
    words = (a + b).to(tl.uint32, bitcast=True)
    return ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def xor_uniform(a, b):
    """23 bits each, those of the columns with the exponent of 1 above them: one operation."""
    return (a ^ b).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def multiply_shift_uniform(a, b):
    """Two rounds of a hash of the column's word, seeded by the row's."""
    words = a.to(tl.uint32, bitcast=True) * 0x9E3779B1 + b.to(tl.uint32, bitcast=True)
    words = (words ^ (words >> 15)) * 0x85EBCA77
    return (words >> 8).to(tl.float32) * (1 / 16777216)


# Ways out of the kernel, for a tile of e and u (BLOCK_N, BLOCK_V).


@triton.jit
def append_each(e, u, rows, inside, start_v, N, out_ptr, slots_ptr, stride_out):
    """An atomic for every entry that is kept: all of them are predicated."""
    keep = (e > u) & inside[:, None]
    cols = start_v + tl.arange(0, e.shape[1])[None, :]
    one = tl.full(e.shape, 1, tl.int32)
    slots = tl.atomic_add(slots_ptr + rows[:, None] + 0 * cols, one, mask=keep, sem="relaxed")
    out_ptrs = out_ptr + rows[:, None] * stride_out + slots
    tl.store(out_ptrs, cols + 0 * slots, mask=keep & (slots < stride_out))


@triton.jit
def append_rows(e, u, rows, inside, start_v, N, out_ptr, slots_ptr, stride_out):
    """An atomic for every row that keeps something, and a running count of its entries."""
    keep = (e > u) & inside[:, None]
    kept = keep.to(tl.int32)
    count = tl.sum(kept, 1)
    first = tl.atomic_add(slots_ptr + rows, count, mask=count > 0, sem="relaxed")
    slots = first[:, None] + tl.cumsum(kept, 1) - kept
    cols = start_v + tl.arange(0, e.shape[1])[None, :]
    out_ptrs = out_ptr + rows[:, None] * stride_out + slots
    tl.store(out_ptrs, cols + 0 * slots, mask=keep & (slots < stride_out))


@triton.jit
def _store_words(words, rows, inside, start_v, out_ptr, stride_out):
    offs_w = start_v // 32 + tl.arange(0, words.shape[1])
    tl.store(out_ptr + rows[:, None] * stride_out + offs_w[None, :], words, mask=inside[:, None])


@triton.jit
def mask_shifted(e, u, rows, inside, start_v, N, out_ptr, slots_ptr, stride_out):
    """Bit v % 32 of word v // 32, shifted there."""
    BLOCK_N: tl.constexpr = e.shape[0]
    BLOCK_V: tl.constexpr = e.shape[1]
    bits = (e > u).to(tl.int32) << (tl.arange(0, BLOCK_V) % 32)[None, :]
    words = tl.sum(tl.reshape(bits, [BLOCK_N, BLOCK_V // 32, 32]), 2)
    _store_words(words, rows, inside, start_v, out_ptr, stride_out)


@triton.jit
def mask_by_lanes(e, u, rows, inside, start_v, N, out_ptr, slots_ptr, stride_out):
    """The same words: each lane packs what it holds first, then four lanes exchange."""
    BLOCK_N: tl.constexpr = e.shape[0]
    BLOCK_V: tl.constexpr = e.shape[1]
    cols = tl.arange(0, BLOCK_V)
    bits = tl.where(e > u, (1 << (cols // 8 % 4 * 8 + cols % 2))[None, :], 0)
    bits = tl.reshape(bits, [BLOCK_N, BLOCK_V // 32, 4, 4, 2])
    words = tl.sum(tl.sum(tl.sum(bits, 4), 2) << (2 * tl.arange(0, 4)), 2)
    _store_words(words, rows, inside, start_v, out_ptr, stride_out)


@triton.jit
def mask_by_bytes(e, u, rows, inside, start_v, N, out_ptr, slots_ptr, stride_out):
    """Words of what one thread holds, by way of bytes."""
    BLOCK_N: tl.constexpr = e.shape[0]
    BLOCK_V: tl.constexpr = e.shape[1]
    cols = tl.arange(0, BLOCK_V)
    bits = tl.where(e > u, (1 << (cols // 8 % 4 * 2 + cols % 2))[None, :], 0)
    bytes_ = tl.sum(tl.sum(tl.reshape(bits, [BLOCK_N, BLOCK_V // 128, 4, 4, 4, 2]), 5), 3)
    words = tl.sum(bytes_ << (8 * tl.arange(0, 4))[None, None, :, None], 2)
    words = tl.reshape(words, [BLOCK_N, BLOCK_V // 32])
    _store_words(words, rows, inside, start_v, out_ptr, stride_out)


@triton.jit
def mask_in_threads(e, u, rows, inside, start_v, N, out_ptr, slots_ptr, stride_out):
    """Words of what one thread holds: columns 8 j + 2 q + {0, 1} with q its lane modulo 4."""
    BLOCK_N: tl.constexpr = e.shape[0]
    BLOCK_V: tl.constexpr = e.shape[1]
    cols = tl.arange(0, BLOCK_V)
    bits = tl.where(e > u, (1 << (cols // 8 % 16 * 2 + cols % 2))[None, :], 0)
    bits = tl.reshape(bits, [BLOCK_N, BLOCK_V // 128, 16, 4, 2])
    words = tl.reshape(tl.sum(tl.sum(bits, 4), 2), [BLOCK_N, BLOCK_V // 32])
    _store_words(words, rows, inside, start_v, out_ptr, stride_out)


@triton.jit
def count_entries(e, u, rows, inside, start_v, N, out_ptr, slots_ptr, stride_out):
    count = tl.sum((e > u).to(tl.int32), 1)
    tl.store(out_ptr + start_v // e.shape[1] * N + rows, count, mask=inside)


@triton.jit
def any_entry(e, u, rows, inside, start_v, N, out_ptr, slots_ptr, stride_out):
    """1 where the row keeps something in this tile."""
    found = (tl.max(e - u, 1) > 0).to(tl.int32)
    tl.store(out_ptr + start_v // e.shape[1] * N + rows, found, mask=inside)


@triton.jit
def forward_kernel(
    # descriptors of (N, H) and (V, H); (N,) int32, (N,) fp32
    hidden,
    weight,
    ids_ptr,
    anchor_ptr,
    # (V,) and (N,) int32
    column_words_ptr,
    row_words_ptr,
    # (tiles, N) fp32; what the way writes; (N,) int32
    sums_ptr,
    out_ptr,
    slots_ptr,
    N,
    V,
    stride_out,
    scale,
    H: tl.constexpr,
    PROGRAMS: tl.constexpr,
    UNIFORM: tl.constexpr,
    WAY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Sums of e = 2^(scale z - anchor) over each tile but the target, and what a way draws."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    tiles = blocks_n * tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        start_n = tile % blocks_n * BLOCK_N
        start_v = tile // blocks_n * BLOCK_V
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start_h in range(0, H, BLOCK_H):
            h = hidden.load([start_n, start_h])
            w = weight.load([start_v, start_h])
            z = tl.dot(h, w.T, z)
        rows = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        cols = tl.arange(0, BLOCK_V)
        inside = rows < N
        anchor = tl.load(anchor_ptr + rows, mask=inside, other=0.0)
        index = tl.load(ids_ptr + rows, mask=inside, other=-1) - start_v
        left_out = (cols[None, :] == index[:, None]) | (cols >= V - start_v)[None, :]
        e = tl.where(left_out, 0.0, tl.exp2(z * scale - anchor[:, None]))
        tl.store(sums_ptr + start_v // BLOCK_V * N + rows, tl.sum(e, 1), mask=inside)
        if WAY is not None:
            # Beyond V as well u must not be negative, where e is 0: 1 is the least that xor takes.
            within = cols < V - start_v
            a = tl.load(column_words_ptr + start_v + cols, mask=within, other=0x3F800000)
            b = tl.load(row_words_ptr + rows, mask=inside, other=0)
            u = UNIFORM(a[None, :], b[:, None])
            WAY(e, u, rows, inside, start_v, N, out_ptr, slots_ptr, stride_out)


TILES = {
    "128x256x64, 8 warps": Launch({"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_H": 64}, 8, 3),
    "128x128x64, 4 warps": Launch({"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_H": 64}, 4, 3),
    "256x128x64, 8 warps": Launch({"BLOCK_N": 256, "BLOCK_V": 128, "BLOCK_H": 64}, 8, 3),
}


class Form(NamedTuple):
    """A way out and the numbers that decide, as they are written in the kernel."""

    way: Any = None
    uniform: Any = None

    @property
    def label(self) -> str:
        if self.way is None:
            return "none"
        return f"{self.way.__name__}, {self.uniform.__name__.removesuffix('_uniform')}"


FORMS = [
    Form(),
    *(
        Form(way, sum_uniform)
        for way in (
            *(append_each, append_rows),
            *(mask_shifted, mask_by_lanes, mask_by_bytes, mask_in_threads),
            *(count_entries, any_entry),
        )
    ),
    Form(mask_shifted, multiply_shift_uniform),
    Form(mask_by_lanes, xor_uniform),
    Form(mask_in_threads, multiply_shift_uniform),
    Form(mask_in_threads, wrapping_sum_uniform),
    Form(mask_in_threads, xor_uniform),
    Form(any_entry, xor_uniform),
]
# Operations that wait or share a unit: special functions, memory, lanes, barriers, jumps.
CLASSES = ("MUFU.EX2", "ATOMG", "SHFL", "VOTE", "STS", "LDS", "STG", "LDG", "BAR", "BRA")


def compile_form(form: Form, launch: Launch) -> Any:
    arguments = [
        *("tensordesc<bf16[BLOCK_N, BLOCK_H]>", "tensordesc<bf16[BLOCK_V, BLOCK_H]>"),
        *("*i32/16", "*fp32/16", "*i32/16", "*i32/16", "*fp32/16", "*i32/16", "*i32/16"),
        *("i32", "i32", "i32/16", "fp32", HIDDEN, MULTIPROCESSORS, form.uniform, form.way),
    ]
    case = Case(forward_kernel, "", 16, arguments)
    return compile_case(case, launch, PARTS["sm_90"])


def figures(form: Form, launch: Launch) -> dict[str, Any]:
    """Return what a form takes, the instructions of its epilogue, and those of each class."""
    kernel = compile_form(form, launch)
    used = usage(kernel)
    row = {"registers": used.registers, "stack": used.stack, "shared": used.shared}
    row["instructions"] = used.instructions
    epilogue = Counter(_epilogue(tool("nvdisasm", "-c", kernel=kernel)))
    return row | {"epilogue": epilogue.total()} | {name: epilogue[name] for name in CLASSES}


def _epilogue(code: str) -> list[str]:
    """Return the operations of the least jump that skips all exponentials.

    The flattened loop takes it on every step but a tile's last.
    """
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    operations: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z]\w+)(.*)", line):
            name, rest = found.groups()
            operations.append("MUFU.EX2" if rest.startswith(".EX2") else name)
            if name == "BRA" and (target := re.search(r"`\((\.L\w+)\)", rest)):
                jumps.append((len(operations), target[1]))
    exponentials = [i for i, name in enumerate(operations) if name == "MUFU.EX2"]
    skipped = [
        operations[start : labels[target]]
        for start, target in jumps
        if start <= exponentials[0] and labels[target] > exponentials[-1]
    ]
    return min(skipped, key=len)


def study(forms: list[Form] = FORMS, tiles: dict[str, Launch] = TILES) -> list[dict[str, Any]]:
    """Return a row a tile and form; `added`: instructions per logit beyond those without a draw."""
    rows = []
    for tile, launch in tiles.items():
        held = launch.blocks["BLOCK_N"] * launch.blocks["BLOCK_V"] / (32 * launch.num_warps)
        none = figures(Form(), launch)["epilogue"]
        for form in forms:
            found = figures(form, launch)
            added = round((found["epilogue"] - none) / held, 2)
            rows.append({"tile": tile, "form": form.label, "added": added, **found})
    return rows


def traffic(
    vocab: int = VOCAB, hidden: int = HIDDEN, kept: int = KEPT, tile: int = 256, rows: int = 128
) -> dict[str, dict[str, float]]:
    """Return KB per row that each way moves: written, read back, and weights to score again.

    Entries lie anywhere. `count` takes the tiles of a row that have an entry, or, with `rows` rows
    at a time, those that have one of any of these rows: in the end all, the whole product again.
    The others gather the weight rows of the entries. 16-bit weights, 32-bit ids.
    """
    tiles, weight_row = math.ceil(vocab / tile), 2 * hidden

    def hit(entries: float) -> float:
        return tiles * (1 - (1 - 1 / tiles) ** entries)

    ways = {
        "append": (4 * kept + 4, 4 * kept + 4, kept * weight_row),
        "mask": (vocab / 8, vocab / 8, kept * weight_row),
        "count, row by row": (tiles, tiles, hit(kept) * tile * weight_row),
        f"count, {rows} rows": (tiles, tiles, hit(rows * kept) * tile * weight_row / rows),
    }
    columns = ("written", "read", "weights")
    return {
        way: {name: round(moved / 1e3, 1) for name, moved in zip(columns, all_moved, strict=True)}
        for way, all_moved in ways.items()
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table, the columns in their order."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(f"{row[name]:,}" if not isinstance(row[name], str) else row[name]
                                for name in names) + " |" for row in rows]  # fmt: skip
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RECORD)
    path = parser.parse_args(arguments).output
    rows, moved = study(), traffic()
    print(markdown(rows))
    print(f"\nKB per row, V={VOCAB}, H={HIDDEN}, {KEPT} entries:\n")
    print(markdown([{"way": way, **columns} for way, columns in moved.items()]))
    content = {
        "triton": triton.__version__,
        "date": now().isoformat(timespec="seconds"),
        "part": "sm_90",
        "shape": {"vocab": VOCAB, "hidden": HIDDEN, "kept": KEPT},
        "rows": rows,
        "kb_per_row": moved,
    }
    write_record(path, content)


if __name__ == "__main__":
    main()
