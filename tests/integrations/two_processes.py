"""Runs of TRL's trainer and of ours on each of the ranks that torchrun starts: see the test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from trl import GRPOTrainer

from fastgrpo.integrations.trl import FastGRPOTrainer, fused_loss
from trl_runs import grpo, logged


def run(trainer: type, loss_type: str, folder: Path, output: Path) -> dict[str, object]:
    """Train; return what is logged, the parameters, and how often `grpo_loss` was called."""
    calls, original = [], fused_loss.grpo_loss
    fused_loss.grpo_loss = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    made = grpo(
        trainer, folder, output, loss_type=loss_type, max_steps=4, ddp_backend="gloo",
        beta=0.04, num_iterations=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    made.train()
    fused_loss.grpo_loss = original
    assert made.accelerator.num_processes == 2
    parameters = torch.cat([p.detach().flatten() for p in made.model.parameters()])
    return {"logged": logged(made), "parameters": parameters, "calls": len(calls)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, output = map(Path, sys.argv[1:])
    results = [
        [run(trainer, loss_type, folder, output) for trainer in (GRPOTrainer, FastGRPOTrainer)]
        for loss_type in ("dapo", "grpo")
    ]
    torch.save(results, output / f"rank{os.environ['RANK']}.pt")
