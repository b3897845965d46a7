"""Completions to read, with their rewards: greedy held-out ones, and groups of the training."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tqdm import tqdm

from .atomic import sync
from .best_effort import BestEffort, say
from .completions import Rollout
from .evaluation import Evaluation
from .model import Policy
from .rollout import texts

TITLE = b"# Completions\n"
SHOWN_OF_EVALUATION = 16
SHOWN_OF_GROUP = 4
CONSOLE_CHARACTERS = 160


class SampleLog:
    """Appends to a Markdown file as the run goes on, so that a run that is cut has its samples.

    Of a file that is there, the first ``kept`` bytes stay; those that are missing are said. What
    cannot be written later is said once and left out. ``size`` is what stands there, in bytes.
    """

    def __init__(self, path: Path, kept: int = 0) -> None:
        self.path, self._effort = path, BestEffort(str(path))
        with path.open("ab") as file:
            self.size = min(kept, file.tell())
        if self.size < kept:
            say(f"{path} has {self.size} of the {kept} bytes that were written")
        os.truncate(path, self.size)
        if not self.size:
            path.write_bytes(TITLE)
            self.size = len(TITLE)

    def sync(self) -> None:
        """Have the disk hold what was written, as far as it can."""
        with self._effort:
            sync(self.path)

    def add_evaluation(self, title: str, evaluation: Evaluation) -> None:
        """Append greedy completions of held-out prompts."""
        parts = [_heading(f"{title}: held-out, greedy ({evaluation})")]
        for prompt, completion, reward in evaluation.samples[:SHOWN_OF_EVALUATION]:
            parts.append(_fenced(prompt, [(reward, completion)]))
        self._append("".join(parts))

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
        self._append(_heading(f"Step {step}: training, sampled") + _fenced(prompt, shown))
        tqdm.write(f"  {_short(prompt[-CONSOLE_CHARACTERS:])}")
        for reward, completion in shown:
            tqdm.write(f"    reward {reward:g}: {_short(completion)}")

    def _append(self, text: str) -> None:
        """Write a text in place of what an error left of the last one."""
        with self._effort:
            written = text.encode()
            with self.path.open("r+b") as file:  # which makes no new file where it was removed
                self.size = min(self.size, file.seek(0, os.SEEK_END))
                file.truncate(self.size)
                file.seek(self.size)
                file.write(written)
            self.size += len(written)


def _heading(text: str) -> str:
    return f"\n## {text}\n"


def _fenced(prompt: str, shown: list[tuple[float, str]]) -> str:
    """Return a prompt and completions with their rewards, fenced by more tildes than they have."""
    fence = "~" * (3 + max(text.count("~") for text in (prompt, *(text for _, text in shown))))
    parts = [f"\n{fence}\n{prompt}\n{fence}\n"]
    parts += [f"\nreward {reward:g}\n\n{fence}\n{text}\n{fence}\n" for reward, text in shown]
    return "".join(parts)


def _short(text: str) -> str:
    line = repr(text)[1:-1]
    return line if len(line) <= CONSOLE_CHARACTERS else f"{line[:CONSOLE_CHARACTERS]} ..."
