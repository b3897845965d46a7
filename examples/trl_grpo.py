"""GRPO with TRL's trainer and fastgrpo's loss: a tiny model learns to add, without a download.

  python examples/trl_grpo.py                    # pip install 'fastgrpo[train,trl]'
  python examples/trl_grpo.py --loss_type cispo --epsilon_high 5 --num_iterations 2

First the model imitates a careless teacher, then it is rewarded for right sums, as in
grpo_train.py. Flags are the fields of TRL's GRPOConfig; what is logged is TRL's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import HfArgumentParser, set_seed
from trl import GRPOConfig

from fastgrpo.integrations.trl import FastGRPOTrainer
from fastgrpo.train.arithmetic import arithmetic_task
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.evaluation import evaluate
from fastgrpo.train.load import load_policy
from fastgrpo.train.sampler import ModelSampler
from fastgrpo.train.warmup import warm_up


@dataclass
class Settings(GRPOConfig):
    """GRPOConfig with defaults for a tiny model and short answers."""

    output_dir: str = "runs/trl_grpo"
    imitation_steps: int = 400
    max_steps: int = 60
    per_device_train_batch_size: int = 256
    num_generations: int = 16
    max_completion_length: int = 5
    learning_rate: float = 3e-4
    logging_steps: float = 10
    save_strategy: str = "no"
    report_to: str = "none"
    bf16: bool = False
    use_cpu: bool = not torch.cuda.is_available()


def main(args: Settings) -> tuple[float, float]:
    """Train; return the accuracy on held-out sums before and after."""
    set_seed(args.seed)
    config = TrainConfig(dtype="float32", warmup_steps=args.imitation_steps)
    task, policy = arithmetic_task(args.seed, config.eval_size), load_policy(config)
    warm_up(policy, task, range(config.warmup_steps), config)

    sampler, length = ModelSampler(policy), args.max_completion_length

    def accuracy() -> float:
        return evaluate(policy, sampler, task, 256, length, safe_point=lambda: None).accuracy

    def right(completions: list[str], answer: list[str], **_: object) -> list[float]:
        return task.rewards[0].function(completions, answer)

    before = accuracy()
    trainer = FastGRPOTrainer(
        model=policy.model,
        processing_class=policy.tokenizer,
        reward_funcs=right,
        train_dataset=Dataset.from_list(
            [{"prompt": e.prompt, "answer": e.answer} for e in task.train]
        ),
        args=args,
    )
    trainer.train()
    return before, accuracy()


if __name__ == "__main__":
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(sys.argv[1:])
    print("held-out accuracy: {:.3f} before, {:.3f} after".format(*main(settings)))
