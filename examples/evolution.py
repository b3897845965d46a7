"""REINFORCE over parameters from top to bottom: perturb the weights, score, move. No backward.

  python examples/evolution.py                                    # the task of grpo_train.py
  torchrun --nproc-per-node 2 --local-ranks-filter 0 examples/evolution.py

Under torchrun every process scores its share of the candidates, on its own copy of the model. The
processes exchange one number per candidate and step; each draws the noise again from its seed. At
the end all of them hold the same weights, bit for bit, and the run checks that. ``--help`` lists
the settings. The run folder of the first process gets the same files as that of grpo_train.py.

The embedded task is easy for this method: after the warm-up the model knows its digits and has to
lose one habit of its teacher, which takes a few directions among 0.4M. dimension.py measures what
happens where many directions matter.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from transformers import set_seed

from fastgrpo.train import ranks
from fastgrpo.train.arithmetic import arithmetic_task
from fastgrpo.train.config import one_line_errors, parsed
from fastgrpo.train.evolution import Evolution, check_search, searched
from fastgrpo.train.fitness import mean_reward
from fastgrpo.train.gsm8k import gsm8k_task
from fastgrpo.train.load import load_policy
from fastgrpo.train.model import Policy
from fastgrpo.train.run import Run
from fastgrpo.train.run_folder import check_output_dir
from fastgrpo.train.sampler import ModelSampler
from fastgrpo.train.tasks import Example, Shuffled, Task
from fastgrpo.train.warmup import warm_up


def flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class EvolutionConfig:
    """Settings of one run; the defaults are for the embedded task."""

    task: Literal["arithmetic", "gsm8k"] = flag("arithmetic", "What to learn.")
    model: str | None = flag(None, "Model folder or hub name; arithmetic: by default a tiny model.")
    data: str | None = flag(None, "JSONL file to train on (gsm8k).")
    eval_data: str | None = flag(None, "JSONL file to evaluate on (gsm8k).")
    output_dir: str | None = flag(None, "Run folder; by default a new one under runs/.")
    seed: int = flag(0, "Seed of data, weights and noise.")
    device: str = flag("auto", "auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "auto: bfloat16 on CUDA.")

    sigma: float = flag(0.01, "Standard deviation of the noise on every weight.")
    learning_rate: float = flag(0.001, "Learning rate of the first step; it falls linearly to 0.")
    num_pairs: int = flag(16, "Antithetic pairs of candidates per step.")
    shaping: Literal["ranks", "zscore"] = flag("ranks", "Transform of the scores before averaging.")
    num_prompts: int = flag(64, "Prompts that each candidate of a step answers, greedily.")
    max_completion_length: int = flag(5, "Most tokens of a completion.")
    max_steps: int = flag(30, "Number of updates.")
    warmup_steps: int = flag(400, "Supervised steps first (arithmetic).")
    eval_size: int = flag(512, "Held-out prompts.")
    eval_every: int = flag(5, "Steps between held-out evaluations; 0 = only before and after.")

    # Settings that the shared parts of the training loop read, and that have no flag here.
    num_generations: ClassVar[int] = 1
    backend: ClassVar[str] = "auto"
    gradient_checkpointing: ClassVar[bool] = False
    lora_rank: ClassVar[int] = 0
    max_minutes: ClassVar[None] = None
    tensorboard: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.task == "gsm8k" and not (self.data and self.model):
            raise ValueError("task gsm8k: expected data (a JSONL file) and model, got none")
        if self.task == "gsm8k" and self.warmup_steps:
            raise ValueError("warmup_steps: no effect on gsm8k, which has no demonstrations")
        if self.task == "arithmetic" and (self.data or self.eval_data):
            raise ValueError("task arithmetic: takes no data or eval_data")
        for name in ("num_prompts", "max_completion_length", "eval_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "warmup_steps", "eval_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        check_search(self.sigma, self.learning_rate, self.num_pairs, self.shaping)


def train(run: Run, policy: Policy, task: Task, config: EvolutionConfig) -> None:
    """Improve the policy by the scores of its perturbed copies; ``run`` logs and saves."""
    if task.demonstrations:
        warm_up(policy, task, run.steps(config.warmup_steps, "warm-up"), config)
    run.before = run.evaluate("Before")
    print(f"held-out before: {run.before}")

    search = Evolution(
        policy.model,
        sigma=config.sigma,
        learning_rate=config.learning_rate,
        num_pairs=config.num_pairs,
        shaping=config.shaping,
        seed=config.seed,
    )
    prompts = Shuffled(task.train, config.seed)
    for step in run.steps(config.max_steps, "evolution"):
        search.learning_rate = config.learning_rate * (1 - (step - 1) / config.max_steps)
        # All candidates answer the same prompts: none is favoured by easier ones.
        examples = list(islice(prompts, config.num_prompts))
        scores = score_candidates(search, run, examples)
        search.update(scores)
        answers = scores.numel() * config.num_prompts
        run.log(step, {"reward": scores.nanmean().item()}, answers * config.max_completion_length)
    run.after = run.evaluate("After")


def score_candidates(search: Evolution, run: Run, examples: list[Example]) -> torch.Tensor:
    """Return the scores of this step's candidates, (2 * num_pairs,), from all processes."""
    rank, processes = ranks.rank(), ranks.count()
    candidates, length = search.candidates(), run.config.max_completion_length
    scores = torch.zeros(len(candidates))
    for i in range(rank, len(candidates), processes):
        with search.perturbed(candidates[i]):
            scores[i] = mean_reward(run.policy, run.sampler, run.task, examples, length)
    if processes > 1:
        # Every score comes from one process and is 0 in the others: the sum is exact.
        dist.all_reduce(scores)
    return scores


def digest(policy: Policy) -> str:
    """Return the SHA-256 of the weights' bits."""
    parts = [p.detach().cpu().contiguous() for p in searched(policy.model).values()]
    return hashlib.sha256(
        b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts)
    ).hexdigest()


def compare_weights(policy: Policy, config: EvolutionConfig) -> None:
    """Raise RuntimeError unless all processes hold the same bits; print what was exchanged."""
    rank, processes = ranks.rank(), ranks.count()
    digests: list[str] = [""] * processes
    dist.all_gather_object(digests, digest(policy))
    if len(set(digests)) > 1:
        raise RuntimeError(f"weights differ between processes: {digests}")
    weights = sum(p.numel() * p.element_size() for p in searched(policy.model).values())
    print(
        f"{processes} processes hold the same weights, sha256 {digests[rank][:16]}; "
        f"exchanged a step: {4 * 2 * config.num_pairs} bytes of scores, weights are {weights} bytes"
    )


def parse_flags() -> EvolutionConfig:
    """Return the settings of the command line; a wrong one ends the process with one line."""
    with one_line_errors():
        return parsed(EvolutionConfig, sys.argv[1:], "Train by scores of perturbed weights.")


def main(config: EvolutionConfig) -> int:
    """Run the training that ``config`` describes and return the exit code.

    A setting that cannot work ends the process with one line.
    """
    set_seed(config.seed)
    if config.model is None:
        torch.set_num_threads(1)  # as in grpo_train.py
    with one_line_errors():
        ranks.check_device(config.device)
        check_output_dir(config.output_dir, goes_on=False)
        policy = load_policy(config)
        if config.task == "arithmetic":
            task = arithmetic_task(config.seed, config.eval_size)
        else:
            task = gsm8k_task(policy.tokenizer, config.data, config.eval_data, config.eval_size)
        run = Run(config, policy, ModelSampler(policy), task)
    with run:
        train(run, policy, task, config)
    if dist.is_initialized():
        compare_weights(policy, config)
    return run.exit_code


if __name__ == "__main__":
    with ranks.processes():
        sys.exit(main(parse_flags()))
