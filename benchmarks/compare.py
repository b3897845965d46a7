"""Time one shape on this machine, every installed peer beside fastgrpo, the fastest first.

    python -m benchmarks.compare --tokens 2048 --vocab 49152 --hidden 576 --dtype float32

What is timed is a GRPO loss with its gradients. A provider whose results are wrong is not timed.
"""

from __future__ import annotations

import argparse
import math
import os
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch

from benchmarks import cases, environment, providers
from benchmarks.measure import OWN_BARS
from benchmarks.shapes import Shape

MODE = "loss"
CHECKED_ROWS = 512  # tokens whose results are held against float64: its logits take their time
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in OWN_BARS}
COLUMNS = 100
BUSY = 0.5  # processes per core that spoil a comparison


class Comparison(NamedTuple):
    """The timed rows of `cases.speed` with their errors, fastest first, and who is not in them."""

    shape: Shape
    dtype: torch.dtype
    rounds: int
    rows: list[dict[str, Any]]
    left_out: dict[str, str]  # provider -> why
    load: float  # runnable processes per core before the comparison: others' work


def compare(shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int) -> Comparison:
    """Check every provider that works here, then time those that are right, in rotated rounds."""
    load = os.getloadavg()[0] / os.cpu_count()
    available, left_out = providers.load()
    part = _shape(min(shape.rows, CHECKED_ROWS), shape.vocab, shape.hidden)
    errors = {}
    for row in cases.accuracy(available, part, dtype, MODE, device):
        if "failure" in row:
            left_out[row["provider"]] = row["failure"]
        else:
            errors[row["provider"]] = row["errors"]
    right = [provider for provider in available if provider.name in errors]
    timed = cases.speed(
        right, shape, dtype, MODE, device, rounds=rounds, seconds=math.inf, peaks=True
    )
    left_out |= {row["provider"]: row["failure"] for row in timed if "failure" in row}
    rows = [row | {"errors": errors.get(row["provider"])} for row in timed if "failure" not in row]
    rows.sort(key=lambda row: row["median_ms"])
    return Comparison(shape, dtype, rounds, rows, left_out, load)


def table(found: Comparison) -> str:
    """Return the comparison as text of at most 100 columns."""
    shape, dtype = found.shape, str(found.dtype).removeprefix("torch.")
    checked = min(shape.rows, CHECKED_ROWS)
    size = f"{shape.rows} tokens x {shape.vocab} vocabulary x {shape.hidden} hidden"
    lines = [
        f"GRPO loss and gradients, {size}, {dtype}; rounds: {found.rounds}",
        f"{'implementation':<24}{'median ms':>12}{'bound/time':>12}{'peak MiB':>12}"
        f"{'dhidden error':>16}{'dweight error':>16}",
    ]
    for row in found.rows:
        line = f"{row['provider']:<24}{row['median_ms']:>12,.1f}{row['share_of_bound']:>12.2f}"
        if row["provider"] == cases.BOUND:
            products = row["dtype"]
        else:
            dhidden, dweight = row["errors"]["dhidden"], row["errors"]["dweight"]
            line += f"{row['peak_mib']:>12,.0f}{dhidden:>16.1e}{dweight:>16.1e}"
        lines.append(line)
    lines += [
        f"{cases.BOUND}: the three plain {products} products alone, timed in the same rounds.",
        f"Peak: above the inputs. Errors: relative L2 distance from float64, on {checked} tokens.",
        "fastgrpo sparse estimates gradients from a few drawn entries: its errors are that noise.",
    ]
    if found.load > BUSY:
        busy = f"{found.load:.1f} processes per core"
        lines.append(f"The machine was busy before ({busy}): measure again later.")
    if found.left_out:
        lines += textwrap.wrap(f"Left out: {_by_reason(found.left_out)}.", COLUMNS)
    return "\n".join(lines)


def _by_reason(left_out: dict[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        short = textwrap.shorten(reason.removeprefix("ImportError: "), COLUMNS)
        names.setdefault(short, []).append(name)
    return "; ".join(f"{', '.join(who)} ({reason})" for reason, who in names.items())


def _shape(tokens: int, vocab: int, hidden: int) -> Shape:
    return Shape("compared", tokens, vocab, hidden, sequences=math.gcd(tokens, 8))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with the message alone: the usage above it would hide it."""
        self.exit(2, f"{message}\n")


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return int(text)

    return whole_number


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"expected {' or '.join(DTYPES)}, got {text!r}")
    return DTYPES[text]


def main(arguments: list[str] | None = None) -> None:
    device = environment.device()
    rounds = 30 if device.type == "cuda" else 3
    parser = _Parser(description=__doc__.splitlines()[0])
    for name, default, least in (("tokens", 2048, 1), ("vocab", 49152, 2), ("hidden", 576, 1)):
        help = f"default: {default}"
        parser.add_argument(f"--{name}", type=_at_least(least), default=default, help=help)
    help = f"{' or '.join(DTYPES)}; default: float32"
    parser.add_argument("--dtype", type=_dtype, default=torch.float32, help=help)
    help = f"of all, one call each; default: {rounds} on this machine"
    parser.add_argument("--rounds", type=_at_least(1), default=rounds, help=help)
    options = parser.parse_args(arguments)
    print("\n".join(textwrap.wrap(environment.header(), COLUMNS)), flush=True)
    shape = _shape(options.tokens, options.vocab, options.hidden)
    try:
        found = compare(shape, options.dtype, device, options.rounds)
    except RuntimeError as error:
        # What a provider cannot allocate is its own failure; these are the inputs and the bound.
        if "memory" not in str(error):
            raise
        size = f"{options.tokens} x {options.vocab} x {options.hidden}"
        names = "arguments --tokens, --vocab, --hidden"
        parser.error(f"{names}: expected a size that fits in memory, got {size}")
    print(table(found))


if __name__ == "__main__":
    main()
