"""What a driver refuses, planted into launchers: the stand-in must refuse it too, and say why.

Triton checks a descriptor when it is made, so that it is spoiled afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from fastgrpo_kernels import anchored_logps
from fastgrpo_kernels.runtime import LAUNCHES
from tests.kernels.launch.cases import Case, run_exps, run_linear, run_scatter


def misplaced(descriptor) -> None:
    descriptor.base = descriptor.base.flatten()[1:]


def odd_stride(descriptor) -> None:
    descriptor.strides = [descriptor.strides[0] + 1, 1]


def overlapping(descriptor) -> None:
    descriptor.strides = [8, 1]


def empty(descriptor) -> None:
    descriptor.shape = [0, descriptor.shape[1]]


# What it says about each.
DESCRIPTORS = {
    "TMA: the base is not at 16 bytes": misplaced,
    "TMA: a stride is not a multiple of 16": odd_stride,
    "TMA: rows overlap": overlapping,
    "TMA: a size is not 1 to 2^32": empty,
}
GRID = "grid y or z beyond 65535"
RESOURCES = "out of resource: shared memory"


def planted(arch: str) -> Iterator[Case]:
    yield GRID, run_wide_grid
    yield RESOURCES, lambda: run_many_stages(arch)
    if (16, arch) in LAUNCHES["anchored_logps"]:
        for complaint, spoil in DESCRIPTORS.items():
            yield complaint, lambda spoil=spoil: run_spoiled(spoil)


def run_wide_grid() -> None:
    """A program for each 256 columns."""
    run_scatter(1, 1, 65536 * 256, torch.bfloat16)


def run_many_stages(arch: str) -> None:
    """A launch entry whose tiles in flight do not fit."""
    entry = LAUNCHES["linear_logps"][16, arch]
    deep = dataclasses.replace(entry, num_stages=8)
    with mock.patch.dict(LAUNCHES["linear_logps"], {(16, arch): deep}):
        run_linear(300, 600, 1024, False, dtype=torch.bfloat16)


def run_spoiled(spoil: Callable[[object], None]) -> None:
    from_tensor = anchored_logps.TensorDescriptor.from_tensor

    def spoiled(*arguments):
        descriptor = from_tensor(*arguments)
        spoil(descriptor)
        return descriptor

    with mock.patch.object(anchored_logps.TensorDescriptor, "from_tensor", spoiled):
        run_exps(300, 5003, 72, False)
