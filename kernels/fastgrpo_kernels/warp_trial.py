"""Try the warp-specialised kernel on a device: `python -m fastgrpo_kernels.warp_trial cuda:0`.

`anchored_variant` starts it. Its last line is PASSED, or says what went wrong. A variant counts as
right if its sums are those of the flattened kernel.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .anchored_logps import _sum_tiles
from .anchored_variant import PASSED
from .child import end_with_parent
from .operands import Head, Rows
from .runtime import LAUNCHES, Launch, architecture

REPEATS = 10  # a race need not show the first time


class Variant(NamedTuple):
    """What makes the compiler generate different code, but for the exact sizes."""

    fp16: bool  # or bf16
    entropy: bool
    softcap: bool
    bias: bool
    temperature: bool
    whole_tiles: bool  # V a multiple of the tile's width
    narrow: bool  # fewer steps over H than the pipeline has stages, the last one cut off

    def __str__(self) -> str:
        return ", ".join(name for name, on in self._asdict().items() if on) or "plain"


# In the first eight any two options meet in all four combinations, and one has every option of a
# head. The others are what most models launch. All 128 would take eight minutes to compile.
VARIANTS = [
    *(
        Variant(a, b, c, a ^ b, a ^ c, b ^ c, a ^ b ^ c)
        for a, b, c in itertools.product((False, True), repeat=3)
    ),
    Variant(False, True, False, False, False, True, False),
    Variant(False, True, False, False, True, False, False),
]


def sums_of(device: torch.device, launch: Launch, variant: Variant) -> tuple[Tensor, str]:
    """The sums of a problem with several tiles per multiprocessor, and the kernel's TTGIR."""
    n, vocab_size = 300, 50_176 if variant.whole_tiles else 50_000
    hidden_size = 72 if variant.narrow else 512
    dtype = torch.float16 if variant.fp16 else torch.bfloat16
    g = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=g, device=device, dtype=dtype)
    ids = torch.randint(vocab_size, (n,), generator=g, device=device)
    inv_temperature = torch.linspace(0.5, 2.0, n, device=device) if variant.temperature else None
    rows = Rows(draw(n, hidden_size), ids, inv_temperature)
    bias = draw(vocab_size) if variant.bias else None
    softcap = 5.0 if variant.softcap else 0.0
    head = Head(draw(vocab_size, hidden_size), bias, hidden_size**-0.5, softcap)
    anchor = torch.full((n,), 40.0, device=device)
    partials, kernel = _sum_tiles(launch, rows, head, anchor, variant.entropy)
    return partials.sum(1), kernel.asm["ttgir"]  # (1 or 2, n)


def refusal(
    trial: Callable[[Launch, Variant], tuple[Tensor, str]], specialised: Launch, flattened: Launch
) -> str:
    """Say which variant of the specialised entry must not be used, and why; "" if all may.

    `trial` runs a variant with an entry and returns its sums and its TTGIR.
    """
    for variant in VARIANTS:
        try:
            complaint = _complaint(partial(trial, variant=variant), specialised, flattened)
        except Exception as error:  # whatever a compiler or a driver throws
            complaint = f"it failed with {type(error).__name__}: {error}"
        if complaint:
            return f"variant {variant}: {complaint}"
    return ""


def _complaint(
    trial: Callable[[Launch], tuple[Tensor, str]], specialised: Launch, flattened: Launch
) -> str:
    expected, _ = trial(flattened)
    for _ in range(REPEATS):
        sums, ir = trial(specialised)
        # The compiler ignores requests for warp specialisation in silence.
        if "ttg.warp_specialize" not in ir:
            return "the compiler ignored it"
        # A race in the code that it generates shows here.
        if not torch.allclose(sums, expected, rtol=1e-5, atol=0.0):
            return "its sums are wrong"
    return ""


def main(name: str) -> None:
    end_with_parent()
    device = torch.device(name)
    key = 16, architecture(device)
    entries = LAUNCHES["anchored_logps_small_h"][key], LAUNCHES["anchored_logps"][key]
    reason = refusal(partial(sums_of, device), *entries)
    print(" ".join(reason.split()) or PASSED, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
