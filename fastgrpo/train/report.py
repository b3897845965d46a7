"""The output of a run: its folder, result.json, reward.png and samples.md."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from matplotlib.figure import Figure

from .config import TrainConfig
from .evaluation import Evaluation


def new_run_folder(config: TrainConfig) -> Path:
    """Create and return ``output_dir``, or a new folder under runs/ named by task, seed, time."""
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    name = f"{config.task}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        folder = Path("runs") / (name + suffix)
        if not folder.exists():
            break
    folder.mkdir(parents=True)
    return folder


def write_report(
    folder: Path,
    config: TrainConfig,
    rows: list[dict[str, float | None]],
    before: Evaluation | None,
    after: Evaluation | None,
    **more: object,
) -> None:
    """Write result.json, reward.png and samples.md; an evaluation that was not made is None."""
    result = {
        "accuracy_before": before and before.accuracy,
        "accuracy_after": after and after.accuracy,
        "steps": len(rows),
        **more,
        "seed": config.seed,
        "config": dataclasses.asdict(config),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "samples.md").write_text(_samples(before, after), encoding="utf-8")
    _plot(folder / "reward.png", rows, before, after)


def _samples(before: Evaluation | None, after: Evaluation | None, count: int = 16) -> str:
    lines = ["# Greedy completions of held-out prompts", ""]
    for title, evaluation in (("Before", before), ("After", after)):
        if evaluation is None:
            continue
        lines += [f"## {title} (accuracy {evaluation.accuracy:.3f})", ""]
        for prompt, completion, reward in evaluation.samples[:count]:
            fence = "~" * (3 + max(prompt.count("~"), completion.count("~")))
            lines += [f"reward {reward:g}", fence, prompt, "---", completion, fence, ""]
    return "\n".join(lines)


def _plot(
    path: Path,
    rows: list[dict[str, float | None]],
    before: Evaluation | None,
    after: Evaluation | None,
) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    nan = float("nan")
    steps = [row["step"] for row in rows]
    axes.plot(
        steps,
        [nan if (r := row["reward"]) is None else r for row in rows],
        alpha=0.6,
        label="training reward",
    )
    held_out = [(row["step"], row["accuracy"]) for row in rows if row.get("accuracy") is not None]
    held_out = ([(0, before.accuracy)] if before else []) + held_out
    if after and steps and held_out[-1][0] != steps[-1]:
        held_out.append((steps[-1], after.accuracy))
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", label="held-out accuracy (greedy)")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
