"""What a loss over a support costs beside the dense one: `python -m benchmarks.support_cost`.

For heads of 49,152 and of 151,936 tokens it checks and times the loss with its gradients at the
profiles of benchmarks/supports.py, takes the peak memory of each in a process of its own, and times
the two ways of a row, gathered rows of the weight and tiles of logits, over the number of its ids.
The record, benchmarks/results/support-<device>-<date>.json, is written after every stage. It needs
a quiet machine.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import cases, environment
from benchmarks.batches import make_batch
from benchmarks.data import LossInputs
from benchmarks.measure import SUPPORT_MODES, run
from benchmarks.providers import Provider, fastgrpo, plain_logits
from benchmarks.shapes import TINY_SHAPES, Shape
from benchmarks.supports import PROFILES, with_support
from benchmarks.timing import interleave, percentile
from fastgrpo.head import support

SHAPES = (Shape("49k", 2048, 49152, 576), Shape("152k", 2048, 151936, 896))
DENSE, MASKED = "dense", "masked logits"
CHECKED_ROWS, CURVE_ROWS = 256, 256
# Of the vocabulary: how many ids a row of the curve keeps.
CURVE = (1 / 1024, 1 / 256, 1 / 64, 1 / 32, 1 / 16)
WAYS = {"gathered": 1, "tiles": math.inf}  # GEMM_SHARE with which all rows go one way
CPU, DTYPE = torch.device("cpu"), torch.float32
Rows = list[dict[str, Any]]


def times(shape: Shape, rounds: int, masked: bool) -> Rows:
    """Return the samples of the dense loss and of each profile's, on the same rows in turns.

    With `masked` those of full logits whose other ids are masked, too, at the last profile: how
    many ids are kept does not matter to them.
    """
    batch, own = make_batch(shape, DTYPE, "loss", CPU), fastgrpo("torch")
    calls = {DENSE: partial(run, own, "loss", batch)}
    facts: dict[str, dict[str, Any]] = {DENSE: {}, MASKED: {}}
    for mode, chosen in SUPPORT_MODES.items():
        counts = PROFILES[chosen.support].counts(shape.rows)
        given = with_support(batch, counts)
        calls[mode] = partial(run, own, "loss", given)
        facts[mode] = {
            "ids_mean": counts.double().mean().item(),
            "ids_median": counts.median().item(),
            "alone": (counts == 1).double().mean().item(),
        }
    if masked:
        calls[MASKED] = partial(run, plain_logits(), "loss", given)
    return [row | facts[row["name"]] for row in _timed(calls, shape, rounds)]


def curve(shape: Shape, rounds: int) -> Rows:
    """Return the samples of both ways, by the number of ids that every row keeps."""
    shape = shape._replace(rows=min(CURVE_ROWS, shape.rows))
    batch, own = make_batch(shape, DTYPE, "loss", CPU), fastgrpo("torch")
    rows = []
    for share in CURVE:
        count = max(2, round(share * shape.vocab))
        given = with_support(batch, torch.full((shape.rows,), count))
        calls = {way: partial(_one_way, own, given, WAYS[way]) for way in WAYS}
        calls[DENSE] = partial(run, own, "loss", batch)
        rows += [row | {"ids": count} for row in _timed(calls, shape, rounds)]
    return rows


def _one_way(provider: Provider, batch: LossInputs, share: float) -> None:
    with mock.patch.object(support, "GEMM_SHARE", share):
        run(provider, "loss", batch)


def _timed(calls: dict[str, Callable[[], object]], shape: Shape, rounds: int) -> Rows:
    """Return a row for each call; its share is the median over rounds of its time to DENSE's."""
    samples, failures = interleave(calls, device=CPU, rounds=rounds, seconds=math.inf)
    if failures:
        raise RuntimeError(f"{shape.label}: {failures}")
    rows = []
    for name, found in samples.items():
        shares = [a / b for a, b in zip(found, samples[DENSE], strict=False)]
        times = {f"p{q}_ms": percentile(found, q / 100) for q in (10, 50, 90)}
        share = {"of_dense": percentile(shares, 0.5), "samples_ms": found}
        rows.append({"shape": shape._asdict(), "name": name, **times, **share})
    return rows


def stages(shapes: tuple[Shape, ...], rounds: int) -> list[tuple[str, Callable[[], Rows]]]:
    """Return what is measured, each with the section of the record that it adds to."""
    own, found = fastgrpo("torch"), []
    for shape in shapes:
        part = shape._replace(rows=min(CHECKED_ROWS, shape.rows))
        for mode in SUPPORT_MODES:
            providers = [own] if shape is not shapes[0] else [own, plain_logits()]
            check = partial(cases.accuracy, providers, part, DTYPE, mode, CPU)
            found.append(("accuracy", check))
        found.append(("times", partial(times, shape, rounds, shape is shapes[0])))
        found.append(("curve", partial(curve, shape, min(rounds, 3))))
        for mode in ("loss", *SUPPORT_MODES):
            peak = partial(cases.memory, [own], shape, DTYPE, mode, timeout=120)
            found.append(("memory", peak))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, and leave the record; end with 1 where a result was wrong or did not come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of every loss, in turns; default 5")
    parser.add_argument("--output", type=Path, help="file of the record")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes")
    options = parser.parse_args(arguments)
    if options.rehearse and options.output is None:
        parser.error("--output: expected with --rehearse")
    path = options.output or environment.record_path("support-")
    record = environment.facts("benchmarks.support_cost") | {
        "profiles": {name: profile._asdict() for name, profile in PROFILES.items()},
        "load_average": [os.getloadavg()[0]],
    }
    for section, work in stages(TINY_SHAPES if options.rehearse else SHAPES, options.rounds):
        record.setdefault(section, []).extend(work())
        record["load_average"].append(os.getloadavg()[0])
        environment.write_record(path, record)
    print(f"wrote {path}")
    failures = [row["failure"] for row in record["accuracy"] + record["memory"] if "failure" in row]
    if failures:
        parser.exit(1, "\n".join(failures) + "\n")


if __name__ == "__main__":
    main()
