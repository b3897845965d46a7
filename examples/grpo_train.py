"""GRPO from top to bottom: sample groups, reward, compare within the group, step.

  python examples/grpo_train.py       # a tiny model learns to add, on two CPU cores
  python examples/grpo_train.py --task gsm8k --data train.jsonl --model Qwen/Qwen2.5-0.5B-Instruct

``--help`` lists the settings. The run folder gets metrics.jsonl, result.json, reward.png,
samples.md and checkpoint/. After Ctrl-C or SIGTERM the script finishes the step, saves everything
and exits with 128 + the signal's number (130 for Ctrl-C); a second signal ends it at once.
``--resume FOLDER`` goes on from the newest checkpoint.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import set_seed

import fastgrpo
from fastgrpo.train import ranks
from fastgrpo.train.catalogue import load_task
from fastgrpo.train.completions import Rollout
from fastgrpo.train.config import TrainConfig, one_line_errors, parse_flags
from fastgrpo.train.dynamic_sampling import draw_groups
from fastgrpo.train.load import load_policy, load_tokenizer
from fastgrpo.train.memory import fitting
from fastgrpo.train.metrics import Averages, over_updates, rollout_metrics, sampler_gap
from fastgrpo.train.microbatches import live_completions, micro_batches, step_normalizer
from fastgrpo.train.model import Policy
from fastgrpo.train.optimizer import MasterAdamW
from fastgrpo.train.reference import Reference
from fastgrpo.train.rollout import encode, texts
from fastgrpo.train.run import Run
from fastgrpo.train.run_folder import check_folder, newest_state
from fastgrpo.train.sampler import ModelSampler
from fastgrpo.train.sampling import Sampling
from fastgrpo.train.scoring import Scores, centred, score
from fastgrpo.train.sharded import shard
from fastgrpo.train.tasks import Example, Shuffled, Task
from fastgrpo.train.warmup import warm_up


def train(run: Run, policy: Policy, task: Task, config: TrainConfig) -> None:
    """Improve the policy with its own completions; ``run`` logs and saves."""
    if run.state is None:
        if task.demonstrations:
            warm_up(policy, task, run.steps(config.warmup_steps, "warm-up"), config)
        run.before = run.evaluate("Before")
    print(f"held-out before: {run.before}")

    reference = Reference(policy) if config.beta > 0 else None
    optimizer = MasterAdamW.of(policy.model, config)
    prompts = Shuffled(task.train, config.seed)
    run.keep(optimizer, prompts, reference)
    for step in run.steps(config.max_steps, "grpo"):
        if reference and config.starts_iteration(step):
            reference.refresh()
        rollout, metrics = sample_groups(run, reference, prompts, step)
        updates = []
        for _ in range(config.num_iterations):
            rollout, found = update(policy, optimizer, rollout, config)
            updates.append(found)
        metrics |= over_updates(updates)
        run.log(step, metrics, tokens=sum(ranks.gathered(len(rollout.token_ids))))
        run.watch(step, metrics, rollout)
    run.after = run.evaluate("After")


def sample_groups(
    run: Run, reference: Reference | None, prompts: Iterator[Example], step: int
) -> tuple[Rollout, dict[str, float]]:
    """Return completions of prompts with their advantages, and the step's first metrics."""
    policy, config, group = run.policy, run.config, run.config.num_generations

    def prompts_of(examples: list[Example]) -> tuple[Tensor, ...]:
        return encode(policy, [e.prompt for e in examples])

    def draw(
        examples: list[Example], before: list[Example], attempt: int
    ) -> tuple[Rollout, Scores]:
        sampling = Sampling.of(config, (config.seed, step, attempt), prompts_of(before))
        rollout = run.sampler.sample(prompts_of(examples), group, sampling)
        each = [e for e in examples for _ in range(group)]
        scores = score(run.task, each, texts(policy, rollout))
        rewards = centred(scores.rewards, group).to(rollout.lengths.device)
        advantages = fastgrpo.group_advantages(rewards, group, estimator=config.advantage_estimator)
        given = scores.rewards.to(rewards.device)
        return replace(rollout, rewards=given, advantages=advantages), scores

    wanted, tries = config.num_prompts, config.resample_flat_groups
    with policy.gathered():
        rollout, scores, dropped = draw_groups(draw, prompts, wanted, tries)
    if reference is not None:
        scoring = (config.temperature, config.backend)
        found = fitting(config, lambda tokens: reference.logps(rollout, tokens, *scoring))
        rollout = replace(rollout, ref_logps=found)
    counted = {"groups_resampled": dropped}
    return rollout, scores.metrics() | rollout_metrics(rollout) | counted


def update(
    policy: Policy, optimizer: MasterAdamW, rollout: Rollout, config: TrainConfig
) -> tuple[Rollout, dict[str, float]]:
    """Take one optimizer step; return the rollout with its ``old_logps``, and the step's metrics.

    Every micro-batch is divided by the count of the whole step, so the result depends neither on
    their size nor on the completions without a gradient, which do not enter the model. The first
    update of a rollout has ratios of 1, and its log-probs are the ``old_logps`` of the next ones.
    """
    loss = config.loss_config()
    normalizer, live = step_normalizer(rollout, loss), live_completions(rollout, loss)
    logps = torch.full_like(rollout.token_ids, math.nan, dtype=torch.float32)

    def gradients(max_tokens: int) -> tuple[float, Averages]:
        total, averages = 0.0, Averages(rollout, live)
        batches = micro_batches(rollout, live, max_tokens, policy.layout, loss)
        for chosen in policy.in_step(batches):
            batch = rollout[chosen]
            out = policy.apply(
                fastgrpo.grpo_loss,
                batch,
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
                support=batch.support,
                sparsity=config.sparsity,
                backend=config.backend,
            )
            optimizer.backward(out.loss)
            total += out.loss.detach()
            if len(batch):
                averages.add(out.metrics | sampler_gap(out.logps, batch))
            logps[rollout.tokens_of(chosen)] = out.logps
        return float(total), averages

    total, averages = fitting(config, gradients, undo=optimizer.clear)
    if rollout.old_logps is None:
        rollout = replace(rollout, old_logps=logps)
    learning_rate, loss_value = optimizer.learning_rate, ranks.mean(total)
    grad_norm = optimizer.step(loss_value, config.max_grad_norm)
    return rollout, averages.means() | {
        "loss": loss_value,
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
        # More threads gain such a small model little, and its numbers would depend on how many.
        torch.set_num_threads(1)
    with one_line_errors():
        ranks.check(config)
        check_folder(config)
        tokenizer = load_tokenizer(config)
        task = load_task(config, tokenizer, task)
        policy = load_policy(config, tokenizer)
    with one_line_errors():
        if config.fsdp:
            policy = shard(policy)
        state = newest_state(config, task, policy.mesh)
        run = Run(config, policy, ModelSampler(policy), task, state)
    with run:
        train(run, policy, task, config)
    return run.exit_code


if __name__ == "__main__":
    with ranks.processes():
        sys.exit(main(parse_flags()))
