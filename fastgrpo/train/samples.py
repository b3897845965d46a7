"""Completions to read, with their rewards: greedy held-out ones, and groups of the training."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tqdm import tqdm

from .completions import Rollout
from .evaluation import Evaluation
from .model import Policy
from .rollout import texts

SHOWN_OF_EVALUATION = 16
SHOWN_OF_GROUP = 4
CONSOLE_CHARACTERS = 160


class SampleLog:
    """Appends to a Markdown file as the run goes on, so that a run that is cut has its samples."""

    def __init__(self, path: Path, written: int | None = None) -> None:
        self.path = path
        if written is None:
            path.write_text("# Completions\n", encoding="utf-8")
        elif not path.is_file() or path.stat().st_size < written:
            raise ValueError(f"resume: expected at least {written} bytes in {path}")
        else:
            os.truncate(path, written)

    @property
    def size(self) -> int:
        """What has been written, in bytes; a run that goes on starts there."""
        return self.path.stat().st_size

    def add_evaluation(self, title: str, evaluation: Evaluation) -> None:
        """Append greedy completions of held-out prompts."""
        self._append(f"{title}: held-out, greedy ({evaluation})")
        for prompt, completion, reward in evaluation.samples[:SHOWN_OF_EVALUATION]:
            self._append_one(prompt, [(reward, completion)])

    def add_group(self, step: int, policy: Policy, rollout: Rollout) -> None:
        """Append some completions of one prompt, from the best to the worst, and print them.

        The prompt is the first whose completions differ in reward, else the first.
        """
        live = (rollout.advantages != 0).nonzero()
        index = rollout.prompt_index[live[0, 0] if len(live) else 0]
        group = rollout[(rollout.prompt_index == index).nonzero()[:, 0]]
        order = group.rewards.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
        count = min(SHOWN_OF_GROUP, len(order))
        picked = order[torch.linspace(0, len(order) - 1, count).long()].tolist()
        completions = texts(policy, group)
        shown = [(group.rewards[i].item(), completions[i]) for i in picked]
        prompt = policy.tokenizer.decode(group.prompts[0])
        self._append(f"Step {step}: training, sampled")
        self._append_one(prompt, shown)
        tqdm.write(f"  {_short(prompt[-CONSOLE_CHARACTERS:])}")
        for reward, completion in shown:
            tqdm.write(f"    reward {reward:g}: {_short(completion)}")

    def _append(self, title: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n## {title}\n")

    def _append_one(self, prompt: str, shown: list[tuple[float, str]]) -> None:
        fence = "~" * (3 + max(text.count("~") for text in (prompt, *(text for _, text in shown))))
        parts = [f"\n{fence}\n{prompt}\n{fence}\n"]
        parts += [f"\nreward {reward:g}\n\n{fence}\n{text}\n{fence}\n" for reward, text in shown]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(parts)


def _short(text: str) -> str:
    line = repr(text)[1:-1]
    return line if len(line) <= CONSOLE_CHARACTERS else f"{line[:CONSOLE_CHARACTERS]} ..."
