"""TRL's side of `benchmarks.train_step`: its GRPOTrainer in its own loop, step by step."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.train_step_case import Answer, Case, Commands, ForcedEnds, times


class Race(GRPOTrainer):
    """The trainer with the case's tokens: prompts always, completions where none are sampled."""

    case: Case
    command: dict[str, Any]
    sampling = 0.0

    def _tokenize_prompts(self, prompts: list) -> tuple:
        ids = self.case.prompt_ids()
        return [ids[int(prompt)] for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> tuple:
        if self.command["what"] == "update":
            return self.case.completion_ids(), None
        ids, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        assert [len(x) for x in ids] == list(self.case.lengths)
        return ids, logps

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        begun = time.perf_counter()
        scored = super()._generate_and_score_completions(inputs)
        self.sampling = time.perf_counter() - begun
        return scored


class StepPerCommand(TrainerCallback):
    """A step of the trainer per command; its times and what it logs are the answer."""

    def __init__(self, trainer: Race, commands: Commands, answer: Answer) -> None:
        self.trainer, self.commands, self.answer = trainer, commands, answer

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.command = next(self.commands)
        self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step = time.perf_counter() - self.begun

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "grad_norm" not in logs:
            return
        found = {name: float(logs[name]) for name in ("loss", "grad_norm")}
        self.answer(found | times(self.trainer.sampling, self.step))


def serve(case: Case, settings: dict[str, Any], commands: Commands, answer: Answer) -> None:
    """Answer each command with what it took, in seconds; StopIteration of the commands ends it."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [{"prompt": str(i)} for i in range(len(case.prompts))]
    completions = len(case.lengths)
    args = GRPOConfig(
        output_dir=settings["folder"],
        use_cpu=settings["device"] == "cpu",
        bf16=settings["dtype"] == "bfloat16",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
        shuffle_dataset=False,
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=completions // settings["batch"],
        gradient_checkpointing=settings["gradient_checkpointing"],
        num_generations=case.group,
        max_completion_length=max(case.lengths),
        max_steps=10**6,
        beta=0.0,
        loss_type="dapo",
        epsilon_high=0.28,
        temperature=1.0,
        top_k=0,
        adam_beta2=0.98,
        weight_decay=0.0,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        model_init_kwargs={"dtype": settings["dtype"]},
    )

    def reward(prompts: list, completions: list, **_: Any) -> list[float]:
        return case.rewards(trainer.command["alive"])

    trainer = Race(
        model=settings["model"],
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.case = case = case._replace(ends=tuple(trainer.eos_token_ids))
    trainer.model.generation_config.update(repetition_penalty=1.0)
    generate = trainer.model.generate
    ends = ForcedEnds(case.lengths, case.ends, max(case.prompts))
    trainer.model.generate = lambda **options: generate(
        **options, logits_processor=LogitsProcessorList([ends])
    )
    trainer.add_callback(StepPerCommand(trainer, commands, answer))
    torch.manual_seed(0)
    try:
        trainer.train()
    except StopIteration:
        return
