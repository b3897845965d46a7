"""Time launch variants of a kernel beside the one in its table, so that a record can correct it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.data import random_batch
from benchmarks.shapes import Shape
from benchmarks.timing import GemmBound, bound_dtype, describe, interleave, summary
from fastgrpo_kernels import Head, Rows, anchored_logps_fwd, linear_logps_fwd, runtime
from fastgrpo_kernels.anchored_variant import SWITCH, refusal
from fastgrpo_kernels.runtime import Launch

TABLE = "table"  # the name of the entry that is in use, where nobody asks for specialised warps
SMALL_H = "anchored_logps_small_h"  # the kernel anchored_logps with entries that specialise warps


def _gemm(rows: int, vocab: int, hidden: int, warps: int, stages: int, split: int = 4096) -> Launch:
    blocks = {"BLOCK_N": rows, "BLOCK_V": vocab, "BLOCK_H": hidden, "SPLIT_V": split, "GROUP_N": 16}
    return Launch(blocks, warps, stages)


def _portable_logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return linear_logps_fwd(Rows(hidden, ids), Head(weight), False).logps


def _persistent(
    rows: int, vocab: int, warps: int, stages: int, *, specialised: bool = False
) -> Launch:
    blocks = {"BLOCK_N": rows, "BLOCK_V": vocab, "BLOCK_H": 64, "GROUP_N": 16}
    flags = {"FLATTEN": not specialised, "WARP_SPECIALIZE": specialised}
    return Launch(blocks | flags, warps, stages)


def _anchored_logps(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return anchored_logps_fwd(Rows(hidden, ids), Head(weight), False).scored.logps


# Kernel -> a call that launches it, and what to try beside the tables' other entries.
CANDIDATES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[Launch, ...]]] = {
    "linear_logps": (
        _portable_logps,
        (
            _gemm(128, 256, 64, 8, 4),
            _gemm(256, 128, 64, 8, 3),
            _gemm(256, 128, 64, 8, 4),
            _gemm(128, 128, 64, 4, 3),
            _gemm(128, 128, 64, 4, 4),
            _gemm(128, 256, 64, 8, 3, split=8192),
            _gemm(128, 256, 64, 8, 3, split=2048),
        ),
    ),
    "anchored_logps": (
        _anchored_logps,
        (
            _persistent(128, 256, 8, 4),
            _persistent(128, 128, 4, 3),
            _persistent(128, 128, 4, 4),
            _persistent(128, 128, 8, 4),
            _persistent(256, 128, 8, 3),
            _persistent(256, 128, 8, 4),
        ),
    ),
    SMALL_H: (
        _anchored_logps,
        (
            _persistent(128, 256, 4, 4, specialised=True),
            _persistent(256, 128, 4, 3, specialised=True),
            _persistent(128, 128, 4, 4, specialised=True),
            _persistent(128, 128, 4, 4),
        ),
    ),
}


def table_of(kernel: str) -> str:
    """Return the table that a launch comes from, whatever else is compared with it."""
    return "anchored_logps" if kernel == SMALL_H else kernel


def has_table(kernel: str, shape: Shape, bits: int, arch: str) -> bool:
    """Return whether a kernel has an entry for a device, and may use it at this shape."""
    if kernel == SMALL_H and shape.hidden > runtime.ANCHORED_SMALL_H:
        return False
    table = runtime.LAUNCHES[kernel]
    return (bits, arch) in table or (bits, "any") in table


def candidates(kernel: str, bits: int, arch: str) -> dict[str, Launch]:
    """Return the launches to compare by name, the one in use first and none of them twice."""
    used = runtime.launch_for(table_of(kernel), bits, arch)
    entries = [
        launch
        for name in (table_of(kernel), kernel)
        for (b, a), launch in runtime.LAUNCHES[name].items()
        if b == bits and a != "interpreter"
    ]
    found: dict[str, Launch] = {TABLE: used}
    for launch in (*entries, *CANDIDATES[kernel][1]):
        if launch not in found.values():
            found[_name(launch)] = launch
    return found


# So that the table of the anchored kernel says what runs, whatever the user has asked for.
@mock.patch.dict(os.environ, {SWITCH: "0"})
def sweep_launches(
    kernel: str, shape: Shape, dtype: torch.dtype, device: torch.device, *, seconds: float
) -> list[dict[str, Any]]:
    """Return one row for each launch: its time and its share of the bound, or why it failed.

    A launch fails if its log-probs are more than 1e-4 nats from those of the table's entry, and
    those with specialised warps if the trial refuses them. Where the kernel does not run there are
    no rows.
    """
    bits, arch = 8 * dtype.itemsize, runtime.architecture(device)
    if not has_table(kernel, shape, bits, arch):
        return []
    batch = random_batch(shape, dtype, device)
    hidden, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
    call = partial(CANDIDATES[kernel][0], hidden, weight, batch.completion_ids.flatten())
    launches = candidates(kernel, bits, arch)
    refused = refusal(hidden.device) if kernel == SMALL_H else ""
    bound = GemmBound(batch, 1, bound_dtype(dtype, device))
    bound()
    expected, calls, rows = call(), {"bound": bound}, {}
    for name, launch in launches.items():
        tried = partial(_launched, kernel, (bits, arch), launch, call)
        rows[name] = {"kernel": kernel, "name": name, "launch": launch.kwargs()}
        rows[name] |= {"shape": shape._asdict(), "dtype": str(dtype).removeprefix("torch.")}
        try:
            if refused and launch.blocks.get("WARP_SPECIALIZE"):
                raise RuntimeError(refused)
            distance = (tried() - expected).abs().max().item()
            if not distance <= 1e-4:
                raise AssertionError(f"{distance:.1e} nats from the table's entry")
            calls[name] = tried
        except Exception as error:  # noqa: BLE001  too much shared memory, say
            rows[name]["failure"] = describe(error)
    samples, failures = interleave(calls, device=device, rounds=20, seconds=seconds)
    for name, row in rows.items():
        if name in samples:
            row |= summary(samples[name], samples["bound"])
        elif name in failures:
            row["failure"] = failures[name]
    return list(rows.values())


def _launched(
    kernel: str, key: tuple[int, str], launch: Launch, call: Callable[[], Tensor]
) -> Tensor:
    with _entry(kernel, key, launch):
        return call()


@contextmanager
def _entry(kernel: str, key: tuple[int, str], launch: Launch) -> Iterator[None]:
    """Put a launch into the table for as long as the context lasts."""
    table = runtime.LAUNCHES[table_of(kernel)]
    before = table.get(key)
    table[key] = launch
    try:
        yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before


def _name(launch: Launch) -> str:
    blocks = " ".join(f"{name}={size}" for name, size in launch.blocks.items())
    return f"{blocks} warps={launch.num_warps} stages={launch.num_stages}"
