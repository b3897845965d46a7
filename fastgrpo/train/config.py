"""TrainConfig: every flag of the training script with its default, and a command line to it."""

from __future__ import annotations

import sys
from argparse import HelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from fastgrpo import LossConfig

from . import ranks
from .defaults import DEFAULTS, PRESETS, TASK_DEFAULTS, default_of
from .flags import Flags
from .rules import check_flags
from .run_folder import saved_settings

Config = TypeVar("Config")


@dataclass
class TrainConfig(Flags):
    """Settings of one run. A field that is None takes its value from ``fastgrpo.train.defaults``.

    What cannot work is a ValueError that names the field, what was expected and what came.
    """

    def __post_init__(self) -> None:
        if self.resume is not None:
            self._take_over(saved_settings(self.resume))
            check_flags(self)
            return
        if self.preset is not None:
            self._apply_preset()
        if self.task is None:
            self.task = "arithmetic"
        if self.beta is None and self.loss is not None:
            self.beta = LossConfig.preset(self.loss).beta or None
        if self.task not in TASK_DEFAULTS:
            raise ValueError(f"task: expected one of {sorted(TASK_DEFAULTS)}, got {self.task!r}")
        if self.beta == 0 and self.ref_model_sync_steps is None:
            self.ref_model_sync_steps = 0  # also where the preset refreshes its reference
        rising = self.lr_warmup_steps
        for name in DEFAULTS:
            if getattr(self, name) is None:
                setattr(self, name, default_of(name, self.task, self.preset))
        if rising is None:
            self.lr_warmup_steps = min(self.lr_warmup_steps, self.max_steps * self.num_iterations)
        if self.advantage_estimator is None:
            self.advantage_estimator = "dr_grpo" if self.loss == "dr_grpo" else "grpo"
        check_flags(self)

    def _take_over(self, saved: dict[str, Any]) -> None:
        """Become the settings of the run that goes on; no other may be given."""
        for f in fields(self):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if getattr(self, f.name) not in (default, saved[f.name]):
                raise ValueError(
                    f"{f.name}: expected no flag beside resume, whose run has {saved[f.name]!r}, "
                    f"got {getattr(self, f.name)!r}"
                )
            setattr(self, f.name, saved[f.name])

    def _apply_preset(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {self.preset!r}")
        preset = PRESETS[self.preset]
        if self.task is None:
            self.task = preset["task"]
        self.gradient_checkpointing |= preset["gradient_checkpointing"]
        if self.loss is not None:  # a loss of one's own has bounds of its own
            return
        given = {option.partition("=")[0] for option in self.loss_option}
        self.loss_option = self.loss_option + [
            option for option in preset["loss_option"] if option.partition("=")[0] not in given
        ]


def parse_flags(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Return the settings of a command line; a wrong one ends the process with one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with one_line_errors():
        flags = [a for a in arguments if a.startswith("--")]
        if any(a.partition("=")[0] == "--resume" for a in flags) and len(flags) > 1:
            raise ValueError(f"resume: expected no flag beside it, got {' '.join(flags)}")
        about = "Train by GRPO; docs/training.md says more about each setting."
        return parsed(TrainConfig, arguments, about)


def parsed(kind: type[Config], arguments: Sequence[str], about: str) -> Config:
    """Return a dataclass of settings from a command line; ValueError for a wrong one."""
    parser = HfArgumentParser(kind, description=about, formatter_class=HelpFormatter)
    parser.error = _error
    config, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"expected flags that --help lists, got {' '.join(unknown)}")
    return config


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Context for what the user's settings decide: a ValueError there is one line, not a trace.

    All processes enter it, and all end where one has an error; the first prints each line once.
    """
    message = None
    try:
        yield
    except ValueError as error:
        message = f"error: {error}"
    if lines := [line for line in dict.fromkeys(ranks.gathered(message)) if line is not None]:
        if ranks.rank() == 0:
            print(*lines, sep="\n", file=sys.stderr)
        raise SystemExit(2)


def _error(message: str) -> NoReturn:
    raise ValueError(message)
