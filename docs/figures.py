"""Make every figure of the documentation, with its data, in docs/figures.

python docs/figures.py              # about a quarter of an hour on two cores
python docs/figures.py --sketches   # only the two that are formulas: seconds
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

import fastgrpo

FOLDER = Path(__file__).parent / "figures"
EXAMPLES = Path(__file__).parents[1] / "examples"


def importance(path: Path) -> None:
    """Draw how the second moment of p / q grows with the shift and with the number of tokens."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shift = torch.linspace(0, 4, 200)
    left.plot(shift, shift.square().exp())
    left.set_xlabel("distance of the means of p and q, in standard deviations")
    left.set_title("two normal distributions")
    tokens = torch.arange(1, 1001)
    for drift in (0.01, 0.03, 0.1):
        right.plot(tokens, (tokens * math.log1p(drift**2)).exp(), label=f"{drift:g}")
    right.set_xlabel("tokens in the sentence")
    right.set_title("sentences")
    right.legend(title="rms of ratio - 1, each token")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylabel("E[(p / q)²]")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def clipping(path: Path) -> None:
    """Draw the loss of one token against its ratio, as `grpo_loss` computes it."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ratio = torch.linspace(0.4, 1.8, 141)
    for axes, advantage in zip(figure.subplots(1, 2), (1.0, -1.0), strict=True):
        # A head of four tokens whose logits say nothing: every log-prob is -ln 4.
        losses = [
            fastgrpo.grpo_loss(
                torch.zeros(1, 1, 1),
                torch.zeros(4, 1),
                torch.zeros(1, 1, dtype=torch.int64),
                torch.ones(1, 1, dtype=torch.bool),
                torch.tensor([advantage]),
                old_logps=(-math.log(4) - r.log()).view(1, 1),
                config="ppo",
            ).loss
            for r in ratio
        ]
        axes.plot(ratio, -advantage * ratio, "--", color="gray", label="without clipping")
        axes.plot(ratio, losses, label="PPO, GRPO")
        axes.set_title(f"advantage {advantage:+.0f}")
        axes.set_xlabel("ratio of new to old probability")
        axes.set_ylabel("loss of the token")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the examples into the folder and draw the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sketches", action="store_true", help="Leave the measured ones alone.")
    parser.add_argument("--output-dir", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    importance(options.output_dir / "importance.png")
    clipping(options.output_dir / "clipping.png")
    if not options.sketches:
        for name in ("estimators", "dimension", "sparse_backward"):
            script = str(EXAMPLES / f"{name}.py")
            command = [sys.executable, script, "--output-dir", str(options.output_dir)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
