"""Runs whose files cannot be written: what can be done without costs nothing else, and is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastgrpo.train import atomic, checkpoint, run_folder
from fastgrpo.train import run as runs
from fastgrpo.train.best_effort import BestEffort
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.evaluation import Evaluation
from fastgrpo.train.metrics import MetricsLog
from fastgrpo.train.not_finite import DUMP, STEPS, NotFinite, NotFiniteError
from fastgrpo.train.samples import SampleLog

from .conftest import TINY_RUN, read_metrics

RUN = TINY_RUN | {
    "max_steps": 4, "warmup_steps": 0, "checkpoint_every": 2, "log_completions_every": 1
}  # fmt: skip
EVALUATION = Evaluation(0.5, [("1+1=", "2", 1.0)], 0.0)


def no_space(*_, **__) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full(monkeypatch):
    """Have the disk be full for every file or folder that has a text in its path."""
    sync = atomic.sync

    def fill(text: str) -> None:
        monkeypatch.setattr(
            atomic, "sync", lambda path: no_space() if text in str(path) else sync(path)
        )

    return fill


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


# ---- what is written while a run goes on -------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    script, tmp_path, capsys, full
) -> None:
    full("checkpoint-4.tmp/training.safetensors")
    assert script.main(TrainConfig(**RUN, output_dir=str(tmp_path))) == 0
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2]
    assert not list(tmp_path.glob("*.tmp")) and result(tmp_path)["whole"]
    assert capsys.readouterr().err.count("checkpoint-4 could not be written, all else goes on") == 1
    checkpoint.load_training(tmp_path / "checkpoint-2")


def test_a_checkpoint_is_tried_again_when_the_run_ends_early(
    script, tmp_path, capsys, monkeypatch, full
) -> None:
    """The disk has room again by then."""
    full("checkpoint-2.tmp")
    report, watch = runs.write_report, script.Run.watch

    def interrupted(run, step, *given) -> None:
        watch(run, step, *given)
        run.interrupt.signum = 2 * (step == 2)

    monkeypatch.setattr(script.Run, "watch", interrupted)
    monkeypatch.setattr(
        runs, "write_report", lambda *given, **more: full("nothing") or report(*given, **more)
    )
    script.main(TrainConfig(**RUN, output_dir=str(tmp_path)))
    assert "checkpoint-2 could not be written" in capsys.readouterr().err
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2]


def test_metrics_come_when_there_is_room_again(tmp_path, capsys) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(1, {"reward": 0.0})
    file = log._file

    class Full:
        """Takes half of a line."""

        def __getattr__(self, name: str):
            return getattr(file, name)

        def write(self, text: bytes) -> int:
            return file.write(text[: len(text) // 2])

    log._file = Full()
    log.write(2, {"reward": 1.0})
    log.write(3, {"reward": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    log._file = file
    log.write(4, {"reward": 3.0})
    log.close()
    assert [row["reward"] for row in read_metrics(tmp_path)] == [0.0, 1.0, 2.0, 3.0]
    printed = capsys.readouterr()
    assert printed.err.count(f"{tmp_path / 'metrics.jsonl'} could not be written") == 1
    assert "step 2 | reward 1.000" in printed.out


def test_samples_are_whole_ones(tmp_path, capsys, monkeypatch) -> None:
    log = SampleLog(tmp_path / "samples.md")
    log.add_evaluation("Before", EVALUATION)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", no_space)
        log.add_evaluation("Lost", EVALUATION)
        log.add_evaluation("Lost", EVALUATION)
    with log.path.open("a") as file:
        file.write("half of " * 50)
    log.add_evaluation("After", EVALUATION)
    text = log.path.read_text()
    assert "Before" in text and "After" in text and not ("Lost" in text or "half" in text)
    assert log.size == log.path.stat().st_size
    assert capsys.readouterr().err.count("samples.md could not be written, all else goes on") == 1


class Board:
    """A SummaryWriter whose thread has ended."""

    def __init__(self, *_, **__) -> None:
        self.calls = []

    def add_scalar(self, *given) -> None:
        self.calls.append(given)
        raise RuntimeError("the writer has ended")

    close = no_space


@pytest.mark.parametrize("step", [1, 0], ids=["a step", "the end"])
def test_a_board_that_raises_is_done_without(tmp_path, capsys, monkeypatch, step) -> None:
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board)
    )
    log = MetricsLog(tmp_path, tensorboard=True)
    board = log._board
    for i in range(3 * step):
        log.write(i + 1, {"reward": 0.5})
    log.close()
    assert len(board.calls) == step and len(read_metrics(tmp_path)) == 3 * step
    assert capsys.readouterr().err.count("tensorboard could not be written") == 1


@pytest.mark.parametrize("broken", [["stdout"], ["stdout", "stderr"]], ids=" and ".join)
def test_a_console_that_is_gone_does_not_end_a_run(
    script, tmp_path, capsys, monkeypatch, broken
) -> None:
    """A full disk, or a pipe whose reader has ended: progress, steps, samples and the end."""
    train = script.train

    def gone(*given) -> None:
        for name in broken:
            monkeypatch.setattr(getattr(sys, name), "_stream", Gone())
        train(*given)

    class Gone:
        encoding, write, flush = "utf-8", no_space, no_space

    monkeypatch.setattr(script, "train", gone)
    assert script.main(TrainConfig(**RUN, output_dir=str(tmp_path))) == 0
    assert len(read_metrics(tmp_path)) == 4 and result(tmp_path)["whole"]
    said = capsys.readouterr().err.count("stdout could not be written, all else goes on: OSError")
    assert said == (broken == ["stdout"])


def test_a_run_whose_folder_is_removed_ends_with_report_and_model(
    script, tmp_path, capsys, monkeypatch
) -> None:
    folder, watch = tmp_path / "run", script.Run.watch

    def removed(run, step, *given) -> None:
        if step == 1:
            shutil.rmtree(folder)
        watch(run, step, *given)

    monkeypatch.setattr(script.Run, "watch", removed)
    assert script.main(TrainConfig(**RUN, output_dir=str(folder))) == 0
    printed = capsys.readouterr().err
    for name in ("metrics.jsonl", "samples.md"):
        assert printed.count(f"{folder / name} could not be written") == 1
    assert result(folder)["steps"] == 4 and (folder / "reward.png").exists()
    assert [step for step, _ in checkpoint.checkpoints(folder)] == [2, 4]
    assert (folder / "checkpoint" / "model.safetensors").exists()


# ---- what is written when it ends, and when it starts ------------------------------------------


@pytest.mark.parametrize("name", ["result.json", "reward.png", "checkpoint.tmp"])
def test_what_cannot_be_saved_costs_nothing_else_and_is_an_exit_code(
    script, tmp_path, capsys, full, name
) -> None:
    full(name)
    assert script.main(TrainConfig(**RUN, output_dir=str(tmp_path))) == 1
    printed = capsys.readouterr()
    assert "could not be written, all else goes on: OSError(28" in printed.err
    assert f"saved in {tmp_path}, but for what could not be written" in printed.out
    there = {path.name for path in tmp_path.iterdir()}
    expected = {
        "result.json": {"checkpoint"},
        "reward.png": {"result.json", "checkpoint"},
        "checkpoint.tmp": {"result.json", "reward.png"},
    }[name]
    assert there == expected | {
        "settings.json", "metrics.jsonl", "samples.md", "checkpoint-2", "checkpoint-4"
    }  # fmt: skip


def test_a_model_that_was_not_saved_is_what_resume_makes(script, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(runs, "save_checkpoint", no_space)
        assert script.main(TrainConfig(**RUN, output_dir=str(tmp_path))) == 1
    assert script.main(TrainConfig(resume=str(tmp_path))) == 0
    assert (tmp_path / "checkpoint" / "model.safetensors").exists() and result(tmp_path)["whole"]


def test_completions_that_cannot_be_written_do_not_hide_the_reason(tmp_path, rollout, full) -> None:
    full(DUMP)
    watch = NotFinite(tmp_path, steps=STEPS - 1)
    with pytest.raises(NotFiniteError, match="not finite in 5 steps.* of the last are lost"):
        watch.watch({"skipped": 1.0}, rollout)


@pytest.mark.parametrize("name", ["settings.json", "metrics.jsonl", "samples.md", "tensorboard"])
def test_a_run_does_not_start_on_a_full_disk(script, tmp_path, capsys, monkeypatch, name) -> None:
    """Where nothing is lost yet."""
    opened = Path.open

    class Full(Board):
        __init__ = no_space

    def open_unless(path: Path, *given, **named):
        return no_space() if path.name.startswith(name) else opened(path, *given, **named)

    monkeypatch.setattr(Path, "open", open_unless)
    monkeypatch.setattr("fastgrpo.train.rules.find_spec", lambda _: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Full))
    flags = RUN | {"tensorboard": name == "tensorboard", "output_dir": str(tmp_path)}
    with pytest.raises(SystemExit) as ended:
        script.main(TrainConfig(**flags))
    assert ended.value.code == 2
    assert (
        f"error: output_dir: expected a folder that can be written, got {tmp_path}: [Errno 28]"
        in capsys.readouterr().err
    )


# ---- what a run that goes on finds ---------------------------------------------------------


@pytest.fixture
def cut(script, tmp_path, monkeypatch) -> Path:
    """A run that was interrupted after its second step."""
    with monkeypatch.context() as patched:
        watch = script.Run.watch

        def interrupted(run, step, *given) -> None:
            watch(run, step, *given)
            run.interrupt.signum = 2 * (step == 2)

        patched.setattr(script.Run, "watch", interrupted)
        assert script.main(TrainConfig(**RUN, output_dir=str(tmp_path))) == 130
    return tmp_path


def test_metrics_that_a_lost_power_took_are_said(script, cut, capsys) -> None:
    rows = (cut / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_bytes(rows[0] + b"\0" * len(rows[1]))
    assert script.main(TrainConfig(resume=str(cut))) == 0
    assert (
        f"{cut / 'metrics.jsonl'} has 1 of the 2 steps that were taken" in capsys.readouterr().err
    )
    assert [row["step"] for row in read_metrics(cut)] == [1, 3, 4]
    assert result(cut)["steps"] == 4


def test_samples_that_a_lost_power_took_are_said(script, cut, capsys) -> None:
    size = (cut / "samples.md").stat().st_size
    os.truncate(cut / "samples.md", 20)
    assert script.main(TrainConfig(resume=str(cut))) == 0
    assert f"samples.md has 20 of the {size} bytes that were written" in capsys.readouterr().err
    assert "## Step 3" in (cut / "samples.md").read_text()


def test_logs_are_on_the_disk_before_a_checkpoint_counts_on_them(
    script, tmp_path, monkeypatch
) -> None:
    order, synced, fsync = [], set(), os.fsync

    def noted(number: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    save = checkpoint.save_training
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(
        runs, "save_training", lambda *given: order.append({*synced}) or save(*given)
    )
    script.main(TrainConfig(**RUN, output_dir=str(tmp_path)))
    assert len(order) == 2 and order[0] >= {"metrics.jsonl", "samples.md"}


def test_a_file_system_without_locks_is_said(tmp_path, capsys, monkeypatch) -> None:
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):

        def no_locks(*_, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(run_folder, "flock", no_locks)
        run_folder.lock(tmp_path).close()
        said = capsys.readouterr().err
        assert said.count(f"a second process that trains in {tmp_path} will not be noticed") == 1


def test_only_errors_are_taken(capsys) -> None:
    with pytest.raises(KeyboardInterrupt), BestEffort("it"):
        raise KeyboardInterrupt
    assert not capsys.readouterr().err
