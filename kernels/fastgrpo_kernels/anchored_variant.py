"""Which variant of the anchored kernel runs: the launch table, a switch, and a trial.

The warp-specialised variant must be asked for, with FASTGRPO_WARP_SPECIALIZE=1. What could go wrong
with it is a race, a deadlock, or a compiler that ends the process. So its first use on a device
waits for a child process, `warp_trial`, and the flattened variant runs unless that one says it may.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .child import run_python
from .runtime import (
    ANCHORED_SMALL_H,
    LAUNCHES,
    Launch,
    architecture,
    capturing,
    launch_for,
    switch,
)

SWITCH = "FASTGRPO_WARP_SPECIALIZE"
TRIAL = ("-m", "fastgrpo_kernels.warp_trial")  # arguments of the interpreter; a device follows
SECONDS = 120.0  # a trial compiles 20 kernels, about 2 s each
PASSED = "the specialised warps passed their trial"  # a line that the trial prints

_REFUSED: dict[torch.device, str] = {}  # why a device must not specialise warps, or ""


def specialises_warps(device: torch.device) -> bool:
    """Whether a device has an entry with specialised warps, and the switch asks for it."""
    has_entry = (16, architecture(device)) in LAUNCHES["anchored_logps_small_h"]
    return switch(SWITCH, default=False) and has_entry


def anchored_launch(hidden: Tensor, scores_only: bool) -> Launch:
    """The launch entry for these operands and this mode."""
    device = hidden.device
    flattened = launch_for("anchored_logps", 16, architecture(device))
    narrow = hidden.shape[1] <= ANCHORED_SMALL_H
    if not (specialises_warps(device) and scores_only and narrow):
        return flattened
    if device not in _REFUSED:
        if capturing(device):  # the next launch outside of a capture has the trial
            return flattened
        _REFUSED[device] = refusal(device)
        if _REFUSED[device]:
            warnings.warn(
                f"fastgrpo: no warp specialisation on {device}, {_REFUSED[device]}; the flattened"
                " kernel runs instead",
                RuntimeWarning,
                stacklevel=2,
            )
    if _REFUSED[device]:
        return flattened
    return launch_for("anchored_logps_small_h", 16, architecture(device))


def refusal(device: torch.device) -> str:
    """Say why warps must not be specialised on a device; "" if they may. Runs the trial."""
    ended = run_python([*TRIAL, str(device)], SECONDS, {SWITCH: "0"})
    if not ended.failure and PASSED in ended.lines:
        return ""
    return f"its trial {ended.failure or 'ended'}, it said: {ended.last_line}"
