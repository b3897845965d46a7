"""TRL's GRPOTrainer against this loop: `python -m benchmarks.train_step`.

Both train the same model, SmolLM2-135M-Instruct where `--model` or $FASTGRPO_SMOLLM2 names its
folder and else random weights of its shape, on 4 prompts of about 150 tokens with 8 completions of
committed lengths. An update learns from committed completions; a step samples its own, whose ends
are forced to come at the same lengths. In half of the groups, or in none, all rewards are equal.
Each side is a process of its own. They take turns, and only one works at a time. The record goes to
benchmarks/results/train-step-<device>-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks import environment
from benchmarks.train_step_case import FULL, SHAPE, TINY, TINY_SHAPE, random_model
from benchmarks.train_step_side import ANSWER

SIDES = ("trl", "ours")
UPDATES = (
    {"what": "update", "alive": "half"},
    {"what": "update", "alive": "all"},
)
STEPS = ({"what": "step", "alive": "half"},)
EVALUATION = {"what": "evaluate", "alive": "half"}
# Row of the table -> command, measure.
ROWS = {
    "update, half of the groups alive": ("update half", "update"),
    "update, every group alive": ("update all", "update"),
    "sampling and scoring": ("step half", "sampling"),
    "whole step, half of the groups alive": ("step half", "step"),
    "peak memory of a step, MiB": ("step half", "peak_mib"),
}

Samples = dict[str, list[dict[str, float]]]


class Side:
    """A process that answers commands."""

    def __init__(self, name: str, settings: dict[str, Any], log: Path) -> None:
        self.name = name
        self.log = log.open("w")
        path = os.pathsep.join(entry for entry in sys.path if entry)
        variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(settings["threads"])}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_step_side", name, json.dumps(settings)],
            cwd=environment.ROOT,
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def ask(self, command: dict[str, str]) -> dict[str, float]:
        """Return the answer to a command; raises ChildProcessError if the process ends instead."""
        print(json.dumps(command), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        said = Path(self.log.name).read_text()[-2000:]
        raise ChildProcessError(f"{self.name} ended at {command}: {said}")

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.log.close()


def measure(
    settings: dict[str, Any], commands: list[dict[str, str]], rounds: int
) -> Iterator[dict[str, Samples]]:
    """Yield after each round what both sides answered so far to each command, "what alive".

    Every side warms up with one update of all groups. The side that goes first changes from
    round to round.
    """
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            Side(name, settings | {"folder": folder}, Path(folder) / f"{name}.log")
            for name in SIDES
        ]
        try:
            samples: dict[str, Samples] = {name: {} for name in SIDES}
            for side in sides:
                samples[side.name]["first update"] = [side.ask(UPDATES[1])]
            for number in range(rounds):
                for command in commands:
                    for side in sides[:: 1 if number % 2 == 0 else -1]:
                        found = side.ask(command)
                        key = f"{command['what']} {command['alive']}"
                        samples[side.name].setdefault(key, []).append(found)
                        print(f"round {number + 1} | {side.name} | {key} | {found}", flush=True)
                if "step half" in samples["ours"]:
                    samples["ours"].setdefault("evaluate", []).append(sides[1].ask(EVALUATION))
                yield samples
        finally:
            for side in sides:
                side.close()


def median(samples: Samples, command: str, measure: str) -> float:
    return statistics.median(sample[measure] for sample in samples[command])


def table(record: dict[str, Any]) -> str:
    """Return the record's figures as a table in Markdown, medians over the rounds."""
    lines = ["| seconds | TRL | this loop | share |", "|---|---|---|---|"]
    for checkpointing, samples in record["samples"].items():
        suffix = "" if checkpointing == "kept" else ", gradient checkpointing"
        for row, (command, what) in ROWS.items():
            if command in samples["ours"]:
                trl, ours = (median(samples[side], command, what) for side in SIDES)
                figures = f"{trl:.1f} | {ours:.1f} | {ours / trl:.2f}"
                lines.append(f"| {row}{suffix} | {figures} |")
    if "evaluate" in record["samples"]["kept"]["ours"]:
        evaluation = median(record["samples"]["kept"]["ours"], "evaluate", "sampling")
        count = len(record["case"]["lengths"])
        lines.append(f"| greedy evaluation, {count} prompts | | {evaluation:.1f} | |")
    return "\n".join(lines)


def race(options: argparse.Namespace, model: str, output: Path) -> dict[str, Any]:
    """Run the race and return its record, which is written after each round."""
    case = TINY if options.rehearse else FULL
    settings = {
        "model": model,
        "rehearse": options.rehearse,
        "vocab": AutoConfig.from_pretrained(model).vocab_size,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        "threads": torch.get_num_threads(),
        "learning_rate": 1e-6,
        "batch": options.trl_batch,
        "budget": options.budget,
    }
    record = environment.facts("benchmarks.train_step") | {
        "model": "random" if options.model is None else Path(model).name,
        "settings": {k: v for k, v in settings.items() if k not in ("model", "rehearse")},
        "case": {"prompts": case.prompts, "lengths": case.lengths},
        "load_average": [os.getloadavg()[0]],
        "samples": {},
    }
    for checkpointing, commands, rounds in (
        ("kept", [*UPDATES, *STEPS], options.rounds),
        ("recomputed", list(UPDATES[1:]), 1),
    ):
        chosen = settings | {"gradient_checkpointing": checkpointing == "recomputed"}
        for samples in measure(chosen, commands, rounds):
            record["samples"][checkpointing] = samples
            record["load_average"].append(os.getloadavg()[0])
            environment.write_record(output, record)
    return record


def main(arguments: list[str] | None = None) -> None:
    """Run the race that the command line describes, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct; default: random weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl-batch", type=int, default=4, help="completions of a micro-batch")
    parser.add_argument("--budget", type=int, default=1024, help="tokens of ours")
    parser.add_argument("--output", type=Path, help="file of the record")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model and a few tokens")
    options = parser.parse_args(arguments)
    if options.rehearse and options.output is None:
        parser.error("--output: expected with --rehearse")
    options.model = options.model or os.environ.get("FASTGRPO_SMOLLM2")
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            random_model(Path(folder), TINY_SHAPE if options.rehearse else SHAPE)
        output = options.output or environment.record_path("train-step-")
        print(table(race(options, options.model or folder, output)))


if __name__ == "__main__":
    main()
