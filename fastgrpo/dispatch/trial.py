"""Check kernels: `python -m fastgrpo.dispatch.trial cuda:0 anchored bfloat16 bfloat16`.

`fastgrpo.doctor` starts it, because a kernel may hang. The kernels are "anchored", "portable" or
"torch"; the dtypes are those of hidden and weight. It prints a line of JSON for each figure, as it
comes, for two sizes of vocabulary: Triton compiles for multiples of 16 apart. The status is
FAULT where a kernel did something that it must not. Any other but 0 says nothing about kernels:
there was no memory, say, or no compiler.
"""

from __future__ import annotations

import json
import sys

import torch

import fastgrpo_kernels
from fastgrpo import torch_kernels
from fastgrpo.dispatch.choice import PORTABLE
from fastgrpo.dispatch.self_check import MODES, VOCAB, figures
from fastgrpo_kernels.child import end_with_parent

KERNELS = {"anchored": fastgrpo_kernels, "portable": PORTABLE, "torch": torch_kernels}
SIZES = (VOCAB, 5120)
FAULT = 4
# What the device says after a kernel that broke a rule.
FAULTS = ("illegal", "misaligned", "device-side assert", "unspecified launch failure")


def main(device: str, kernels: str, *dtypes: str) -> None:
    end_with_parent()
    operands = tuple(getattr(torch, name) for name in dtypes)
    try:
        for vocab in SIZES if operands else SIZES[:1]:
            found = figures(KERNELS[kernels], torch.device(device), operands, MODES, vocab)
            for figure in found:
                print(json.dumps(figure._asdict()), flush=True)
    except RuntimeError as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        sys.exit(FAULT if any(fault in str(error) for fault in FAULTS) else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
