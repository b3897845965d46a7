"""Train under top-p with the support and without: `python -m benchmarks.ratio_to_sampler`.

The embedded task of examples/grpo_train.py, sampled with top-p 0.9, is learnt twice: over the ids
that the sampler kept, and by the softmax over the whole vocabulary, from a sampler that does not
say what it kept. A run is a folder of benchmarks/results/ratio-to-sampler, with the files of
`benchmarks.learning`. The figure is drawn from both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import set_seed

from benchmarks import environment
from benchmarks.learning import curve, keep, kept_run
from benchmarks.train_step_ours import training_script
from fastgrpo.train.catalogue import load_task
from fastgrpo.train.completions import Rollout
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.load import load_policy, load_tokenizer
from fastgrpo.train.run import Run
from fastgrpo.train.sampler import ModelSampler
from fastgrpo.train.sampling import Sampling

RUNS = environment.RESULTS / "ratio-to-sampler"
FIGURE = environment.ROOT / "docs" / "figures" / "support.png"
SETTINGS = {"top_p": 0.9, "max_steps": 100, "device": "cpu", "backend": "torch"}


class WithoutSupport(ModelSampler):
    """Draws as its parent does, and does not say what it kept."""

    def sample(
        self, prompts: Sequence[Tensor], num_generations: int, sampling: Sampling
    ) -> Rollout:
        return replace(super().sample(prompts, num_generations, sampling), support=None)


SAMPLERS = {"support": ModelSampler, "whole-vocabulary": WithoutSupport}
LABELS = {"support": "with the support", "whole-vocabulary": "without"}


def train(name: str, facts: dict[str, Any]) -> None:
    """Train with one of the samplers, and keep the run's files."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(**SETTINGS, output_dir=folder)
        set_seed(config.seed)
        tokenizer = load_tokenizer(config)
        task = load_task(config, tokenizer)
        policy = load_policy(config, tokenizer)
        with Run(config, policy, SAMPLERS[name](policy), task) as run:
            training_script().train(run, policy, task, config)
        keep(Path(folder), RUNS / name, facts)


def draw(path: Path) -> None:
    """Draw the log-ratios to the sampler, and the held-out accuracy, of both runs."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, label), style in zip(LABELS.items(), ("-", "--"), strict=True):
        result, steps, _ = kept_run(name, RUNS)
        gaps = {row["step"]: row["sampler_gap_mean"] for row in steps if "sampler_gap_mean" in row}
        left.plot(list(gaps), list(gaps.values()), style, label=label)
        points = curve(result, steps)
        right.plot(list(points), list(points.values()), style, marker=".", label=label)
    left.set_yscale("log")
    left.set_ylabel("mean |log-ratio| to the sampler, nats")
    right.set_ylabel("held-out accuracy, greedy")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make both runs and draw the figure."""
    torch.set_num_threads(1)
    facts = environment.facts("benchmarks.ratio_to_sampler")
    for name in SAMPLERS:
        train(name, facts)
    draw(FIGURE)


if __name__ == "__main__":
    main()
