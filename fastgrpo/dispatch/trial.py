"""Check kernels: `python -m fastgrpo.dispatch.trial cuda:0 anchored bfloat16 bfloat16`.

`fastgrpo.doctor` starts it, because a kernel may hang. The kernels are "anchored", "portable" or
"torch"; the dtypes are those of hidden and weight. A line of JSON for each figure, as it comes.
The status is UNDECIDED where the kernels did not run, which another day they might.
"""

from __future__ import annotations

import json
import sys

import torch

import fastgrpo_kernels
from fastgrpo import torch_kernels
from fastgrpo.dispatch.choice import PORTABLE
from fastgrpo.dispatch.self_check import figures
from fastgrpo_kernels.runtime import LaunchError

KERNELS = {"anchored": fastgrpo_kernels, "portable": PORTABLE, "torch": torch_kernels}
UNDECIDED = 3


def main(device: str, kernels: str, *dtypes: str) -> None:
    operands = tuple(getattr(torch, name) for name in dtypes)
    found = figures(KERNELS[kernels], torch.device(device), operands, draws=bool(operands))
    try:
        for figure in found:
            print(json.dumps(figure._asdict()), flush=True)
    except (LaunchError, torch.OutOfMemoryError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(UNDECIDED)


if __name__ == "__main__":
    main(*sys.argv[1:])
