"""The check at first use where nothing computes: it launches everything, and finds that out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import fastgrpo_kernels
from fastgrpo.backend import Kernels
from fastgrpo.dispatch.choice import PORTABLE
from fastgrpo.dispatch.self_check import MODES, figures
from fastgrpo_kernels.runtime import LAUNCHES
from tests.kernels.launch.cases import Case

BF16, FP32 = torch.bfloat16, torch.float32


def self_checks(arch: str) -> Iterator[Case]:
    for dtypes in ((BF16, BF16), (FP32, FP32), (BF16, FP32)):
        yield f"portable {dtypes}", partial(run_check, PORTABLE, dtypes)
    if (16, arch) in LAUNCHES["anchored_logps"]:
        yield "anchored", partial(run_check, fastgrpo_kernels, (BF16, BF16))


def run_check(kernels: Kernels, dtypes: tuple[torch.dtype, ...]) -> None:
    found = list(figures(kernels, torch.device("cpu"), dtypes, MODES))
    assert len(found) == 23
    assert not any(figure.holds for figure in found), [str(figure) for figure in found]
