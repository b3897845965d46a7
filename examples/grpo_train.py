"""GRPO from top to bottom: sample groups, reward, compare within the group, step.

  python examples/grpo_train.py       # a tiny model learns to add, on two CPU cores
  python examples/grpo_train.py --task gsm8k --data train.jsonl --model Qwen/Qwen2.5-0.5B-Instruct

``--help`` lists the settings. The run folder gets metrics.jsonl, result.json, reward.png,
samples.md and checkpoint/. After Ctrl-C or SIGTERM the script finishes the step, saves everything
and exits with 128 + the signal's number (130 for Ctrl-C); a second signal ends it at once. There is
one process: sharding (torchrun, FSDP) and resuming are left out to keep the loop short.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from transformers import set_seed

import fastgrpo
from fastgrpo.train.catalogue import load_task
from fastgrpo.train.completions import Rollout
from fastgrpo.train.config import TrainConfig, one_line_errors, parse_flags
from fastgrpo.train.dynamic_sampling import draw_groups
from fastgrpo.train.load import load_policy, load_tokenizer
from fastgrpo.train.metrics import Averages, length_metrics, over_updates, sampler_gap
from fastgrpo.train.microbatches import live_completions, micro_batches, step_normalizer
from fastgrpo.train.model import Policy
from fastgrpo.train.optimizer import MasterAdamW
from fastgrpo.train.reference import Reference
from fastgrpo.train.rollout import encode, texts
from fastgrpo.train.run import Run
from fastgrpo.train.sampler import ModelSampler, Sampling
from fastgrpo.train.scoring import Scores, centred, score
from fastgrpo.train.tasks import Example, Task, shuffled
from fastgrpo.train.warmup import warm_up


def train(run: Run, policy: Policy, task: Task, config: TrainConfig) -> None:
    """Improve the policy with its own completions; ``run`` logs and saves."""
    if task.demonstrations:
        warm_up(policy, task, run.steps(config.warmup_steps, "warm-up"), config)
    run.before = run.evaluate("Before")
    print(f"held-out before: {run.before}")

    reference = Reference(policy) if config.beta > 0 else None
    total_steps = config.max_steps * config.num_iterations
    optimizer = MasterAdamW(
        policy.model.parameters(),
        config.learning_rate,
        total_steps,
        schedule=config.lr_scheduler_type,
        warmup_steps=config.lr_warmup_steps,
    )
    prompts = shuffled(task.train, config.seed)
    for step in run.steps(config.max_steps, "grpo"):
        if reference and config.starts_iteration(step):
            reference.refresh()
        rollout, metrics = sample_groups(run, reference, prompts, step)
        updates = [update(policy, optimizer, rollout, config) for _ in range(config.num_iterations)]
        run.log(step, metrics | over_updates(updates), tokens=len(rollout.token_ids))
        run.watch(step, rollout)
    run.after = run.evaluate("After")


def sample_groups(
    run: Run, reference: Reference | None, prompts: Iterator[Example], step: int
) -> tuple[Rollout, dict[str, float]]:
    """Return completions of prompts with their advantages, and the step's first metrics."""
    policy, config, group = run.policy, run.config, run.config.num_generations

    def draw(num_prompts: int, attempt: int) -> tuple[Rollout, Scores]:
        examples = list(islice(prompts, num_prompts))
        sampling = Sampling(
            config.max_completion_length, config.temperature, seed=(config.seed, step, attempt)
        )
        rollout = run.sampler.sample(encode(policy, [e.prompt for e in examples]), group, sampling)
        each = [e for e in examples for _ in range(group)]
        scores = score(run.task, each, texts(policy, rollout))
        rewards = centred(scores.rewards, group).to(rollout.lengths.device)
        advantages = fastgrpo.group_advantages(rewards, group, estimator=config.advantage_estimator)
        given = scores.rewards.to(rewards.device)
        return replace(rollout, rewards=given, advantages=advantages), scores

    rollout, scores, dropped = draw_groups(draw, config.num_prompts, config.resample_flat_groups)
    scoring = (rollout, config.max_tokens_per_microbatch, config.temperature, config.backend)
    if config.num_iterations > 1:  # else the policy is the one that sampled: the ratio is 1
        rollout = replace(rollout, old_logps=policy.logps(*scoring))
    if reference is not None:
        rollout = replace(rollout, ref_logps=reference.logps(*scoring))
    return rollout, scores.metrics() | length_metrics(rollout) | {
        "flat_groups": 1 - rollout.live_groups.float().mean().item(),
        "groups_resampled": dropped,
    }


def update(
    policy: Policy, optimizer: MasterAdamW, rollout: Rollout, config: TrainConfig
) -> dict[str, float]:
    """Take one optimizer step and return its metrics.

    Every micro-batch is divided by the count of the whole step, so the result depends neither on
    their size nor on the completions without a gradient, which do not enter the model. Metrics are
    means over the tokens of the others, but ``live_rows`` is a share of all tokens.
    """
    loss, total, averages = config.loss_config(), 0.0, Averages()
    normalizer = step_normalizer(rollout, loss)
    live = live_completions(rollout, loss)
    budget = config.max_tokens_per_microbatch
    for chosen in micro_batches(rollout, live, budget, policy.layout, loss):
        batch = rollout[chosen]
        out = fastgrpo.grpo_loss(
            policy.completion_hidden(batch),
            policy.head.weight,
            batch.token_ids,
            None,
            batch.advantages,
            cu_seqlens=batch.cu_seqlens,
            old_logps=batch.old_logps,
            ref_logps=batch.ref_logps,
            sampler_logps=batch.sampler_logps,
            group_ids_or_size=batch.prompt_index if loss.aggregation == "prompt_mean" else None,
            normalizer=normalizer,
            config=loss,
            temperature=config.temperature,
            sparsity=config.sparsity,
            backend=config.backend,
            **policy.head.options(),
        )
        optimizer.backward(out.loss)
        total += out.loss.detach()
        averages.add(out.metrics | sampler_gap(out.logps, batch))
    learning_rate, loss_value = optimizer.learning_rate, float(total)
    grad_norm = optimizer.step(loss_value, config.max_grad_norm)
    metrics = averages.means()
    forwarded = rollout.lengths[live].sum() / rollout.lengths.sum()
    return metrics | {
        "loss": loss_value,
        "live_completions": len(live) / len(rollout),
        "live_rows": metrics.get("live_rows", 0.0) * forwarded.item(),
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "skipped": float(not math.isfinite(loss_value + grad_norm)),
    }


def main(config: TrainConfig, task: Task | None = None) -> int:
    """Run the training that ``config`` describes, or on a task of your own; return the exit code.

    A setting that cannot work ends the process with one line.
    """
    set_seed(config.seed)
    if config.model is None:
        # Such a small model gains little from more threads, and loses much where cores are shared.
        # With one thread the numbers do not depend on the number of cores.
        torch.set_num_threads(1)
    with one_line_errors():
        tokenizer = load_tokenizer(config)
        task = load_task(config, tokenizer, task)
        policy = load_policy(config, tokenizer)
        run = Run(config, policy, ModelSampler(policy), task)
    with run:
        train(run, policy, task, config)
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main(parse_flags()))
