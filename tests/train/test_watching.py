"""What a person sees of a run: samples, the plot, TensorBoard, and why nothing is learnt."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings

import pytest
import torch
from matplotlib.figure import Figure

from fastgrpo.train import ranks
from fastgrpo.train import run as runs
from fastgrpo.train.arithmetic import arithmetic_task
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.evaluation import Evaluation
from fastgrpo.train.metrics import MetricsLog, over_updates
from fastgrpo.train.report import write_report
from fastgrpo.train.rewards import Reward
from fastgrpo.train.samples import SampleLog
from fastgrpo.train.stalled import STEPS, Stalled

from .conftest import read_metrics

NAN = math.nan


def with_rewards(rollout, rewards: list[float]):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    groups = rewards.view(-1, 4)
    apart = (groups - groups.nanmean(dim=1, keepdim=True)).nan_to_num(0.0)
    return dataclasses.replace(rollout, rewards=rewards, advantages=apart.flatten().float())


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ([0.0] * 12, "every completion has reward 0. "),
        ([0.5] * 11 + [NAN], "every completion has reward 0.5. "),
        ([0.0] * 4 + [1.0] * 8, "within each group all completions have the same reward"),
        ([NAN] * 12, "no completion could be scored"),
    ],
    ids=["equal", "equal-but-nan", "flat-groups", "unscorable"],
)
def test_a_warning_says_why_nothing_is_learnt(rollout, rewards, reason: str) -> None:
    flat, stalled = with_rewards(rollout, rewards), Stalled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(STEPS - 1):
            stalled.watch(flat)
        stalled.watch(with_rewards(rollout, [0.0, 1.0] * 6))  # one live step: counted anew
        for _ in range(STEPS - 1):
            stalled.watch(flat)
    with pytest.warns(UserWarning, match=f"{STEPS} steps in a row without any advantage: {reason}"):
        stalled.watch(flat)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stalled.watch(flat)  # said once


def test_samples_are_those_of_a_group_from_best_to_worst(tmp_path, policy, rollout, capsys) -> None:
    log = SampleLog(tmp_path / "samples.md")
    log.add_evaluation("Before", Evaluation(0.5, [("1+1=", "~~~ 2", 1.0)] * 40, 0.0))
    before = log.path.read_text()
    assert before.count("1+1=") == 16 and "~~~~~~\n1+1=\n~~~~~~" in before
    rewards = [0.0] * 4 + [0.0, 3.0, NAN, 1.0] + [5.0, 5.0, 5.0, 0.0]
    log.add_group(7, policy, with_rewards(rollout, rewards))
    added = log.path.read_text().removeprefix(before)
    assert "## Step 7" in added and "34+56=" in added and "1+2=" not in added
    order = [line for line in added.splitlines() if line.startswith("reward")]
    assert order == ["reward 3", "reward 1", "reward 0", "reward nan"]
    printed = capsys.readouterr()
    assert "34+56=" in printed.out and "reward 3: " in printed.out


def test_a_run_shows_samples_now_and_then(script, tmp_path) -> None:
    config = TrainConfig(
        device="cpu", backend="torch", max_steps=4, warmup_steps=0, eval_size=4, num_prompts=2,
        num_generations=4, log_completions_every=2, eval_every=0, output_dir=str(tmp_path),
    )  # fmt: skip
    script.main(config)
    titles = [
        line for line in (tmp_path / "samples.md").read_text().splitlines() if line[:3] == "## "
    ]
    assert [title.split(":")[0] for title in titles] == [
        "## Before", "## Step 2", "## Step 4", "## After"
    ]  # fmt: skip


def test_a_run_ends_after_its_minutes(script, tmp_path, monkeypatch) -> None:
    seconds = iter(range(0, 10**6, 25))
    monkeypatch.setattr(runs.time, "perf_counter", lambda: float(next(seconds)))
    config = TrainConfig(
        device="cpu", backend="torch", max_steps=100, warmup_steps=0, eval_size=4, num_prompts=2,
        num_generations=4, max_minutes=4.0, eval_every=0, output_dir=str(tmp_path),
    )  # fmt: skip
    assert script.main(config) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 < result["steps"] < 10 and result["accuracy_after"] is not None


def test_a_step_logs_the_means_of_its_updates(script, tmp_path, monkeypatch) -> None:
    made, update = [], script.update
    monkeypatch.setattr(script, "update", lambda *given: made.append(update(*given)) or made[-1])
    config = TrainConfig(
        device="cpu", backend="torch", max_steps=1, warmup_steps=0, eval_size=4, num_prompts=2,
        num_generations=4, num_iterations=3, eval_every=0, output_dir=str(tmp_path),
    )  # fmt: skip
    length = Reward("length", lambda completions, **_: [float(len(text)) for text in completions])
    script.main(config, dataclasses.replace(arithmetic_task(0, 4), rewards=(length,)))
    (row,) = read_metrics(tmp_path)
    assert len(made) == 3
    for name in ("loss", "grad_norm", "learning_rate", "kl"):
        values = [metrics[name] for _, metrics in made]
        assert len(set(values)) == 3 and row[name] == pytest.approx(sum(values) / 3)
    assert row["ratio_max"] == max(metrics["ratio_max"] for _, metrics in made)
    assert row["ratio_min"] == min(metrics["ratio_min"] for _, metrics in made)


def test_an_update_that_was_skipped_shows_as_a_share() -> None:
    updates = [{"skipped": 1.0, "loss": NAN}, {"skipped": 0.0, "loss": 1.0}]
    found = over_updates(updates)
    assert found["skipped"] == 0.5 and math.isnan(found["loss"])
    assert over_updates([{"ess": 3.0}, {}]) == {"ess": 3.0}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The axes of a report's plot."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k)
    )

    def draw(rows, before, after):
        write_report(tmp_path, TrainConfig(), rows, before, after)
        return figures[-1].axes

    return draw


def test_the_plot_says_what_its_axes_are(drawn) -> None:
    rows = [
        {"step": 1, "reward": 0.5, "rewards/a/mean": 0.2, "rewards/b/mean": 0.3},
        {"step": 2, "reward": None, "rewards/a/mean": 0.4, "rewards/b/mean": 0.1, "accuracy": 0.7},
        {"step": 3, "reward": 1.0, "rewards/a/mean": 0.5, "rewards/b/mean": 0.5},
    ]
    training, held_out = drawn(rows, Evaluation(0.1, [], 0.0), Evaluation(0.9, [], 0.0))
    assert training.get_ylabel() == "mean reward of a step"
    assert held_out.get_ylabel() == "held-out accuracy, greedy"
    assert held_out.get_xlabel() == "step"
    assert [line.get_label() for line in training.lines] == ["reward", "a", "b"]
    assert training.lines[0].get_xydata().tolist() == [[1, 0.5], [3, 1.0]]
    assert held_out.lines[0].get_xydata().tolist() == [[0, 0.1], [2, 0.7], [3, 0.9]]


def test_without_accuracy_the_plot_shows_held_out_rewards(drawn) -> None:
    samples = [("a", "b", 2.0), ("a", "b", NAN), ("a", "b", 1.0)]
    rows = [{"step": 1, "reward": 0.5, "rewards/a/mean": 0.5, "eval_reward": 1.75}]
    training, held_out = drawn(rows, Evaluation(None, samples, 0.0), None)
    assert held_out.get_ylabel() == "held-out reward, greedy"
    assert held_out.lines[0].get_xydata().tolist() == [[0, 1.5], [1, 1.75]]
    assert [line.get_label() for line in training.lines] == ["reward"]


def test_several_rewards_are_on_the_console(tmp_path, capsys) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(3, {"reward": 0.75, "rewards/a/mean": 0.25, "rewards/b/mean": 0.5, "loss": 0.0})
    log.close()
    assert capsys.readouterr().out.startswith("step 3 | reward 0.750 | a 0.250 | b 0.500 | loss")


def test_tensorboard_gets_every_metric_that_is_a_number(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, tensorboard=True)
    log.write(1, {"reward": 0.5, "kl": NAN})
    log.write(2, {"reward": 0.75})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.5), (2, 0.75)]


def test_an_advantage_in_another_process_counts(rollout, monkeypatch) -> None:
    monkeypatch.setattr(ranks, "gathered", lambda item: [item, True])
    flat, stalled = with_rewards(rollout, [0.0] * 12), Stalled()
    with warnings.catch_warnings(action="error"):
        for _ in range(STEPS):
            stalled.watch(flat)


def test_infinite_losses_of_two_processes_have_a_mean(monkeypatch) -> None:
    """The step is then skipped, where math.fsum would raise."""
    monkeypatch.setattr(ranks, "gathered", lambda item: [item, -item])
    assert math.isnan(ranks.mean(math.inf))
