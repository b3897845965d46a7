"""This project's side of `benchmarks.train_step`: examples/grpo_train.py, step by step."""

from __future__ import annotations

import importlib.util
import math
import time
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from transformers import LogitsProcessorList

import fastgrpo
from benchmarks.environment import ROOT
from benchmarks.train_step_case import Answer, Case, Commands, ForcedEndsOfSamples, times
from fastgrpo.train.completions import Rollout
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.load import load_policy
from fastgrpo.train.optimizer import MasterAdamW
from fastgrpo.train.sampler import ModelSampler
from fastgrpo.train.sampling import Sampling


def serve(case: Case, settings: dict[str, Any], commands: Commands, answer: Answer) -> None:
    """Answer each command with what it took, in seconds, and an update's loss and gradient norm."""
    config = TrainConfig(
        task="gsm8k",
        data="none",
        model=settings["model"],
        device=settings["device"],
        dtype=settings["dtype"],
        gradient_checkpointing=settings["gradient_checkpointing"],
        max_tokens_per_microbatch=settings["budget"],
        num_prompts=len(case.prompts),
        num_generations=case.group,
        max_completion_length=max(case.lengths),
        loss="dapo",
        beta=0.0,
        max_grad_norm=1.0,
        learning_rate=settings["learning_rate"],
    )
    script = training_script()
    policy = load_policy(config)
    case = case._replace(ends=tuple(policy.end_ids))
    optimizer = MasterAdamW(policy.model.parameters(), config.learning_rate, 10**6, warmup_steps=0)
    sampler = ModelSampler(policy)
    device = policy.head.weight.device
    prompts = [torch.tensor(ids, device=device) for ids in case.prompt_ids()]
    width = max(case.prompts)
    for number, command in enumerate(commands):
        begun = time.perf_counter()
        rollout = _committed(case, prompts)
        if command["what"] in ("step", "evaluate"):
            greedy = command["what"] == "evaluate"
            ends = ForcedEndsOfSamples(case.lengths, case.ends, width)
            rollout = sampler.sample(
                prompts * case.group if greedy else prompts,
                1 if greedy else case.group,
                Sampling(
                    max(case.lengths),
                    temperature=0.0 if greedy else 1.0,
                    seed=(number,),
                    processors=LogitsProcessorList([ends]),
                ),
            )
            assert rollout.lengths.tolist() == list(case.lengths)
        sampled = time.perf_counter()
        found: dict[str, float] = {}
        if command["what"] != "evaluate":
            rewards = torch.tensor(case.rewards(command["alive"]), device=device)
            rollout = replace(rollout, advantages=fastgrpo.group_advantages(rewards, case.group))
            _, metrics = script.update(policy, optimizer, rollout, config)
            found = {"loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
            assert math.isfinite(metrics["loss"])
        answer(found | times(sampled - begun, time.perf_counter() - begun))


def _committed(case: Case, prompts: list[torch.Tensor]) -> Rollout:
    device, completions = prompts[0].device, case.completion_ids()
    index = torch.arange(len(prompts), device=device).repeat_interleave(case.group)
    return Rollout(
        prompts=tuple(prompts),
        prompt_index=index,
        token_ids=torch.tensor([i for ids in completions for i in ids], device=device),
        lengths=torch.tensor(case.lengths, device=device),
        finished=torch.ones(len(completions), dtype=torch.bool, device=device),
    )


def training_script() -> ModuleType:
    """Return examples/grpo_train.py as a module."""
    path = ROOT / "examples" / "grpo_train.py"
    spec = importlib.util.spec_from_file_location("grpo_train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
