"""The report of a run: result.json and reward.png."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from bisect import bisect
from pathlib import Path

from matplotlib.figure import Figure

from .atomic import whole_file
from .config import TrainConfig
from .evaluation import Evaluation


def write_report(
    folder: Path,
    config: TrainConfig,
    rows: list[dict[str, float | None]],
    before: Evaluation | None,
    after: Evaluation | None,
    **more: object,
) -> None:
    """Write result.json and reward.png; an evaluation that was not made is None."""
    result = {
        "accuracy_before": before and before.accuracy,
        "accuracy_after": after and after.accuracy,
        "reward_before": before and _finite(before.reward),
        "reward_after": after and _finite(after.reward),
        "steps": rows[-1]["step"] if rows else 0,
        **more,
        "seed": config.seed,
        "config": dataclasses.asdict(config),
    }
    with whole_file(folder / "result.json") as path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    with whole_file(folder / "reward.png") as path:
        _plot(path, rows, before, after)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plot(
    path: Path,
    rows: list[dict[str, float | None]],
    before: Evaluation | None,
    after: Evaluation | None,
) -> None:
    """Draw the rewards of the training, and below them what the evaluations say."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    training, held_out = figure.subplots(2, sharex=True)
    training.plot(*_points(rows, "reward"), label="reward")
    own = [key for key in (rows[0] if rows else ()) if re.fullmatch("rewards/.*/mean", key)]
    for key in own if len(own) > 1 else ():
        training.plot(*_points(rows, key), alpha=0.5, label=key.split("/")[1])
    training.set_ylabel("mean reward of a step")
    training.legend(loc="upper left")

    judged = before is not None and before.accuracy is not None
    steps, values = _points(rows, "accuracy" if judged else "eval_reward")
    last = rows[-1]["step"] if rows else 0
    for step, evaluation in ((0, before), (last, after)):
        if evaluation is not None and step not in steps:
            at = bisect(steps, step)
            steps.insert(at, step)
            values.insert(at, evaluation.accuracy if judged else evaluation.reward)
    held_out.plot(steps, values, marker="o")
    held_out.set_ylabel("held-out accuracy, greedy" if judged else "held-out reward, greedy")
    held_out.set_xlabel("step")
    for axes in (training, held_out):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def _points(rows: list[dict[str, float | None]], key: str) -> tuple[list[float], list[float]]:
    """Return the steps at which a metric is known, and its values."""
    known = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in known], [row[key] for row in known]
