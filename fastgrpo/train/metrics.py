"""Metrics of a run: averages over micro-batches, and one console line and JSON line per step."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import ranks
from .best_effort import BestEffort, say
from .completions import Rollout

CONSOLE = {  # metric -> (label, format)
    "reward": ("reward", ".3f"),
    "flat_groups": ("flat", ".0%"),
    "loss": ("loss", "+.4f"),
    "kl": ("kl", ".4f"),
    "entropy": ("entropy", ".3f"),
    "completions/mean_length": ("len", ".1f"),
    "grad_norm": ("grad", ".2f"),
    "tokens_per_s": ("tok/s", ".0f"),
    "accuracy": ("held-out", ".3f"),
    "eval_reward": ("held-out reward", ".3f"),
}


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Return the lengths of completions in tokens and the share that was cut, by TRL's names.

    And the share of groups without an advantage; all of them of all processes.
    """
    numbers = (rollout.lengths.float(), rollout.finished, rollout.live_groups.float())
    lengths, finished, live = (torch.cat(ranks.gathered(x.cpu())) for x in numbers)
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": (~finished).float().mean().item(),
        "flat_groups": 1 - live.mean().item(),
    }


def sampler_gap(logps: Tensor, rollout: Rollout) -> dict[str, Tensor]:
    """Return how far the sampler's log-probs are from the trainer's, as ``Averages.add`` takes it.

    The trainer's are ``old_logps`` or, on the first update of a batch, ``logps`` (N,). There is
    nothing to compare with where the sampler reported no log-probs (NaN for a token).
    """
    if rollout.sampler_logps is None:
        return {}
    trainer = logps if rollout.old_logps is None else rollout.old_logps
    gap = (trainer - rollout.sampler_logps).abs()
    gap = gap[~rollout.sampler_logps.isnan()]
    if not len(gap):
        return {}
    count = torch.tensor(len(gap), device=gap.device)
    return {
        "sampler_gap_mean": gap.mean(),
        "sampler_gap_mean_count": count,
        "sampler_gap_max": gap.max(),
        "sampler_gap_max_count": count,
    }


class Averages:
    """Means over a step's micro-batches, each weighted by its own count; kept on the device.

    They are over the tokens of the completions at ``live`` (K,) int64, which enter the model. But
    ``live_rows`` is a share of all tokens of the rollout. With several processes all count.
    """

    def __init__(self, rollout: Rollout, live: Tensor) -> None:
        entered, everything = rollout.tokens_of(live).sum(), len(rollout.token_ids)
        self.sums: dict[str, Tensor] = {
            "live_completions": torch.tensor(len(live)),
            "live_tokens": entered,
        }
        self.counts: dict[str, Tensor] = {
            "live_completions": torch.tensor(len(rollout)),
            "live_tokens": torch.tensor(everything),
        }
        self.extrema: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics of one grpo_loss call: every name with its ``<name>_count``."""
        for name in [name for name in metrics if f"{name}_count" in metrics]:
            if name.endswith(("_min", "_max")):
                extremum = torch.minimum if name.endswith("_min") else torch.maximum
                known = self.extrema.get(name, metrics[name])
                self.extrema[name] = extremum(known, metrics[name])
                continue
            count = metrics[f"{name}_count"]
            self.sums[name] = self.sums.get(name, 0) + metrics[name] * count
            self.counts[name] = self.counts.get(name, 0) + count

    def means(self) -> dict[str, float]:
        """Return the means over all processes as numbers (one host synchronisation each)."""
        numbers = [
            {name: value.item() for name, value in some.items()}
            for some in (self.sums, self.counts, self.extrema)
        ]
        sums, counts, extrema = zip(*ranks.gathered(numbers), strict=True)
        count = _added(counts)
        means = {name: total / max(1, count[name]) for name, total in _added(sums).items()}
        means["live_rows"] = means.get("live_rows", 0.0) * means.pop("live_tokens")
        if means.get("importance_square"):
            means["ess"] = means["importance_mean"] ** 2 / means["importance_square"]
        return means | over_updates(extrema)


def _added(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def over_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the metrics of a step from those of its updates: means, and extrema of extrema."""
    found = {}
    for name in dict.fromkeys(name for metrics in updates for name in metrics):
        values = [metrics[name] for metrics in updates if name in metrics]
        if name.endswith(("_min", "_max")):
            found[name] = min(values) if name.endswith("_min") else max(values)
        else:
            found[name] = sum(values) / len(values)
    return found


class MetricsLog:
    """Writes every step to metrics.jsonl, to the console, and for TensorBoard.

    Of a file that is there, the rows of the first ``steps`` steps are kept; those that are missing
    are said. What cannot be written later is said once, and tried again with the next step;
    ``rows`` has all.
    """

    def __init__(self, folder: Path, tensorboard: bool, steps: int = 0) -> None:
        path = folder / "metrics.jsonl"
        # Without a buffer: what a full disk did not take must not come again with the next row.
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        self.rows, self._size = _rows_until(steps, self._file.readall())
        self._written = len(self.rows)
        self._file.truncate(self._size)
        if self._written < steps:
            say(f"{path} has {self._written} of the {steps} steps that were taken")
        self._into_file = BestEffort(str(path))
        self._onto_board = BestEffort(str(folder / "tensorboard"))
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1)

    def close(self) -> None:
        """Close the files."""
        self.sync()
        self._file.close()
        if self._board is not None:
            with self._onto_board:
                self._board.close()

    def sync(self) -> None:
        """Have the disk hold all rows, as far as it can."""
        with self._into_file:
            self._append()
            os.fsync(self._file.fileno())

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log one step; a number that is not finite becomes null in the file."""
        row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self.rows.append(row)
        with self._into_file:
            self._append()
        if self._board is not None:
            with self._onto_board:
                for name, value in metrics.items():
                    if math.isfinite(value):
                        self._board.add_scalar(name, value, step)
            if self._onto_board.failed:
                self._board = None  # its thread has ended, and closing it would wait for that
        tqdm.write(_line(step, metrics), file=sys.stdout)
        sys.stdout.flush()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Log more of the last step."""
        known = {}
        if self.rows and self.rows[-1]["step"] == step:
            row = self.rows.pop()
            if self._written > len(self.rows):
                self._written -= 1
                self._size -= len(_lines([row]))
            known = {k: math.nan if v is None else v for k, v in row.items()}
        self.write(step, known | metrics)

    def _append(self) -> None:
        """Write the rows that are not in the file, all of them or none."""
        if not os.fstat(self._file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "it was removed")
        self._file.truncate(self._size)
        text = _lines(self.rows[self._written :])
        if self._file.write(text) < len(text):
            self._file.truncate(self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(text)
        self._written = len(self.rows)


def _rows_until(steps: int, text: bytes) -> tuple[list[dict[str, float | None]], int]:
    """Return the whole rows of the first ``steps`` steps, and how many bytes they take."""
    rows, size = [], 0
    for line in text.splitlines(keepends=True):
        try:
            row = json.loads(line)
            if not line.endswith(b"\n") or row["step"] > steps:
                break
        except (ValueError, KeyError, TypeError):
            break  # what a machine that lost its power has left
        rows.append(row)
        size += len(line)
    return rows, size


def _lines(rows: list[dict[str, float | None]]) -> bytes:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()


def _line(step: int, metrics: dict[str, float]) -> str:
    """Return what the console shows of a step."""
    shown = [
        f"{label} {metrics[key]:{form}}" for key, (label, form) in CONSOLE.items() if key in metrics
    ]
    own = [name for name in metrics if re.fullmatch("rewards/.*/mean", name)]
    if len(own) > 1:
        shown[1:1] = [f"{name.split('/')[1]} {metrics[name]:.3f}" for name in own]
    return " | ".join([f"step {step}", *shown])
