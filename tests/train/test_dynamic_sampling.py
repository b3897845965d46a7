"""Groups without an advantage make way for others, and the batch is full all the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from fastgrpo.train.arithmetic import arithmetic_task
from fastgrpo.train.completions import Rollout
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.dynamic_sampling import draw_groups
from fastgrpo.train.rewards import Reward
from fastgrpo.train.scoring import Scores

from .conftest import read_metrics

GROUP = 2


class Source:
    """Draws groups that are live (True) or flat (False), as planned; a prompt is its number."""

    def __init__(self, plan: list[bool]) -> None:
        self.plan, self.used = plan, 0
        self.asked: list[tuple[int, int]] = []

    def __call__(
        self, numbers: list[int], before: list[int], attempt: int
    ) -> tuple[Rollout, Scores]:
        num_prompts = len(numbers)
        self.asked.append((num_prompts, attempt))
        self.used += num_prompts
        size = num_prompts * GROUP
        advantages = torch.tensor([x for i in numbers for x in (self.plan[i], -self.plan[i])])
        rollout = Rollout(
            tuple(torch.tensor([i]) for i in numbers),
            torch.arange(num_prompts).repeat_interleave(GROUP),
            torch.arange(size) + GROUP * numbers[0],
            torch.ones(size, dtype=torch.int64),
            torch.ones(size, dtype=torch.bool),
            advantages=advantages.float(),
        )
        return rollout, Scores(advantages.double(), {"alone": advantages.double() + 1})


@pytest.mark.parametrize(
    ("plan", "tries", "kept", "asked"),
    [
        ([True, True, True], 3, [0, 1, 2], [(3, 0)]),
        ([True, False, False, True, True], 1, [0, 3, 4], [(3, 0), (2, 1)]),
        ([False, True, False, False, True, True], 2, [1, 4, 5], [(3, 0), (2, 1), (1, 2)]),
        ([False] * 9, 2, [6, 7, 8], [(3, 0), (3, 1), (3, 2)]),
        ([False] * 3, 0, [0, 1, 2], [(3, 0)]),
        ([False, True, True, False, False], 2, [1, 2, 4], [(3, 0), (1, 1), (1, 2)]),
    ],
    ids=["all live", "one more try", "two more", "never", "no tries", "the last one stays"],
)
def test_flat_groups_make_way(plan: list[bool], tries: int, kept: list, asked: list) -> None:
    source = Source(plan)
    rollout, scores, dropped = draw_groups(source, iter(range(99)), 3, tries)
    assert [int(prompt) for prompt in rollout.prompts] == kept
    assert rollout.prompt_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert rollout.token_ids.tolist() == [GROUP * i + k for i in kept for k in range(GROUP)]
    assert rollout.live_groups.tolist() == [plan[i] for i in kept]
    assert source.asked == asked
    assert dropped == source.used - 3
    assert scores.rewards.tolist() == [x for i in range(source.used) for x in (plan[i], -plan[i])]
    assert torch.equal(scores.by_reward["alone"], scores.rewards + 1)


def run(script, tmp_path, monkeypatch, **flags: object) -> list[dict]:
    """The metrics of two steps in which only sums with an odd result can be solved."""
    calls: Iterator[int] = iter(range(10**6))

    def lucky(completions: list[str], answer: list[str], **_: object) -> list[float]:
        return [float(int(a) % 2 * (next(calls) % 2)) for a in answer]

    task = dataclasses.replace(arithmetic_task(0, 8), rewards=(Reward("lucky", lucky),))
    monkeypatch.setattr(script, "load_task", lambda *_: task)
    sizes = {"num_prompts": 6, "num_generations": 2, "eval_size": 8, "warmup_steps": 0, "beta": 0.0}
    config = TrainConfig(
        **sizes, device="cpu", backend="torch", max_steps=2, output_dir=str(tmp_path), **flags
    )
    assert script.main(config) == 0
    return read_metrics(tmp_path)


def test_a_run_logs_what_was_flat_and_what_was_dropped(script, tmp_path, monkeypatch) -> None:
    plain = run(script, tmp_path / "plain", monkeypatch)
    assert all(row["groups_resampled"] == 0 for row in plain)
    assert all(0 < row["flat_groups"] < 1 for row in plain)
    filled = run(script, tmp_path / "filled", monkeypatch, resample_flat_groups=20)
    for row, before in zip(filled, plain, strict=True):
        assert row["flat_groups"] == 0 and row["groups_resampled"] > 0
        assert row["live_rows"] > before["live_rows"]


def test_tries_below_0_are_refused() -> None:
    with pytest.raises(ValueError, match="resample_flat_groups: expected at least 0, got -1"):
        TrainConfig(resample_flat_groups=-1)
