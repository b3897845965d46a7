"""Runs that are cut, and go on as if they had not been."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fastgrpo.train import atomic, checkpoint
from fastgrpo.train import run as runs
from fastgrpo.train.arithmetic import arithmetic_task
from fastgrpo.train.config import TrainConfig, parse_flags
from fastgrpo.train.interrupt import Interrupt
from fastgrpo.train.not_finite import NotFiniteError
from fastgrpo.train.tasks import Task

from .conftest import TINY_RUN, command, read_metrics

RUN = TINY_RUN | {
    "max_steps": 6,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 1,
    "checkpoint_every": 2,
    "log_completions_every": 1,
}
TIMES = {"tokens_per_s", "eval_seconds"}


class Cut(Exception):
    """What ends a run in the middle of a step."""


def cut_in(script, monkeypatch, number: int) -> None:
    """Have an update of a run fail."""
    update, calls = script.update, []

    def cut(*given):
        calls.append(given)
        if len(calls) == number:
            raise Cut
        return update(*given)

    monkeypatch.setattr(script, "update", cut)


def cut_run(script, lengths: Task, folder: Path, update: int = 4, **flags) -> None:
    """A run that a failing update ends."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_in(script, monkeypatch, update)
        with pytest.raises(Cut):
            script.main(TrainConfig(**RUN | flags, output_dir=str(folder)), lengths)


def what_is_learnt(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict], str]:
    """Weights, metrics but times, and samples."""
    (weights,) = (folder / "checkpoint").glob("*.safetensors")
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder)]
    return load_file(weights), rows, (folder / "samples.md").read_text()


@pytest.mark.parametrize(
    ("flags", "at"),
    [
        ({}, "last step"),
        ({"dtype": "bfloat16", "lr_scheduler_type": "cosine"}, "newest checkpoint"),
        ({"beta": 0.1, "ref_model_sync_steps": 3, "max_steps": 7}, "last step"),
        ({"num_iterations": 2}, "newest checkpoint"),
        ({"sparsity": 0.5}, "last step"),
        ({"model": True}, "newest checkpoint"),
        ({"model": True, "lora_rank": 2, "beta": 0.1}, "last step"),
    ],
    ids=["", "bf16", "reference", "two updates", "sparse", "model", "lora"],
)
def test_a_run_that_was_cut_ends_with_the_same_bits(
    script, lengths, tmp_path, model_folder, flags, at
) -> None:
    if "model" in flags:
        flags = flags | {"model": str(model_folder), "warmup_steps": 0}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script.main(TrainConfig(**RUN | flags, output_dir=str(whole)), lengths)
    cut_run(script, lengths, cut, 3 * flags.get("num_iterations", 1) + 1, **flags)
    if at == "newest checkpoint":
        checkpoint.remove_older(cut, 2)
        (cut / "checkpoint-3").rename(tmp_path / "unused")
    random.seed(1)
    torch.manual_seed(1)
    script.main(TrainConfig(resume=str(cut)), lengths)
    weights, rows, samples = what_is_learnt(whole)
    again, rows_again, samples_again = what_is_learnt(cut)
    assert rows == rows_again and len(rows) == flags.get("max_steps", RUN["max_steps"])
    assert samples == samples_again
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    results = [json.loads((f / "result.json").read_text()) for f in (whole, cut)]
    assert results[0]["reward_before"] == results[1]["reward_before"]
    assert all(r["whole"] and r["error"] is None for r in results)


@pytest.mark.parametrize("again", [False, True], ids=["once", "and again when it is made up for"])
def test_an_evaluation_that_was_cut_is_made_up_for(
    script, lengths, tmp_path, monkeypatch, again
) -> None:
    """Its rewards draw random numbers, which the steps behind it must not miss."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script.main(TrainConfig(**RUN, output_dir=str(whole)), lengths)

    def interrupted(run, title=None):
        if title is not None:
            return evaluate(run, title)
        run.interrupt.signum = signal.SIGINT
        raise KeyboardInterrupt

    evaluate = script.Run.evaluate
    with monkeypatch.context() as patched:
        patched.setattr(script.Run, "evaluate", interrupted)
        code = script.main(TrainConfig(**RUN, output_dir=str(cut)), lengths)
        assert code == 130 and "accuracy" not in read_metrics(cut)[-1]
        if again:
            assert script.main(TrainConfig(resume=str(cut)), lengths) == 130
    assert script.main(TrainConfig(resume=str(cut)), lengths) == 0
    weights, *logs = what_is_learnt(whole)
    weights_again, *logs_again = what_is_learnt(cut)
    assert logs == logs_again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_an_error_leaves_report_model_and_checkpoint(script, lengths, tmp_path) -> None:
    cut_run(script, lengths, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["error"] == "Cut()" and result["steps"] == 3 and not result["whole"]
    assert (tmp_path / "reward.png").exists()
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2, 3]
    trained, kept = (
        load_file(tmp_path / f / "model.safetensors") for f in ("checkpoint", "checkpoint-3")
    )
    assert all(torch.equal(trained[name], kept[name]) for name in kept)


def test_a_step_that_is_half_done_is_nothing_to_go_on_from(script, lengths, tmp_path) -> None:
    """After the first of two updates; the model is saved as it is."""
    cut_run(script, lengths, tmp_path, 8, num_iterations=2)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2]


def test_the_newest_checkpoints_are_kept(script, lengths, tmp_path) -> None:
    (tmp_path / "checkpoint-1.tmp").mkdir()
    script.main(
        TrainConfig(**RUN | {"checkpoint_every": 1, "keep": 3}, output_dir=str(tmp_path)), lengths
    )
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [4, 5, 6]
    assert not list(tmp_path.glob("*.tmp"))


def test_steps_that_were_skipped_before_a_cut_count(script, lengths, tmp_path, monkeypatch) -> None:
    """Three before it, two after it."""
    nothing = {"group_advantages": lambda rewards, *_, **__: torch.full_like(rewards, math.nan)}
    monkeypatch.setattr(script, "fastgrpo", SimpleNamespace(**vars(script.fastgrpo) | nothing))
    cut_run(script, lengths, tmp_path)
    with pytest.raises(NotFiniteError, match="in 5 steps in a row"):
        script.main(TrainConfig(resume=str(tmp_path)), lengths)
    assert [row["skipped"] for row in read_metrics(tmp_path)] == [1.0] * 5


def test_no_checkpoints_where_none_are_asked_for(script, lengths, tmp_path) -> None:
    script.main(TrainConfig(**RUN | {"checkpoint_every": 0}, output_dir=str(tmp_path)), lengths)
    assert not checkpoint.checkpoints(tmp_path)


@pytest.mark.parametrize("cut_at", [1, 2], ids=["first rename", "second rename"])
def test_a_kill_between_two_renames_loses_no_model(script, cut, monkeypatch, cut_at) -> None:
    """What was being replaced stands beside its name; the next run in the folder puts it right."""
    replace, calls = os.replace, []

    class Killed(BaseException):
        pass

    def killed(*given) -> None:
        calls.append(given)
        if len(calls) == cut_at:
            raise Killed
        replace(*given)

    model = cut / "checkpoint" / "model.safetensors"
    old = model.read_bytes()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(atomic.os, "replace", killed)
        with atomic.whole(cut / "checkpoint") as written:
            (written / "model.safetensors").write_bytes(b"new")
    assert model.exists() == (cut_at == 1)
    copy = Path(shutil.copytree(cut, cut.with_name("copy"))) / "checkpoint"
    with pytest.raises(Killed), atomic.whole(copy):  # nor does a write that fails
        raise Killed
    assert (copy / model.name).exists()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(script, "train", lambda *_: (_ for _ in ()).throw(Killed))
        script.main(TrainConfig(resume=str(cut)))
    assert model.read_bytes() == (old if cut_at == 1 else b"new")


# ---- what is refused ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_folder(script, tmp_path_factory) -> Path:
    """A run that was cut in its fourth step."""
    folder = tmp_path_factory.mktemp("cut")
    cut_run(script, arithmetic_task(0, 8), folder)
    return folder


@pytest.fixture
def cut(cut_folder, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(cut_folder, tmp_path / "cut"))


def refused(script, capsys, config: TrainConfig, task: Task | None = None) -> str:
    """The line with which the script ends."""
    with pytest.raises(SystemExit) as ended:
        script.main(config, task)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_folder_with_a_run_is_not_used_again(script, cut, capsys) -> None:
    files = sorted(cut.rglob("*"))
    error = refused(script, capsys, TrainConfig(**RUN, output_dir=str(cut)))
    assert f"output_dir: expected a folder without a run, got {cut}; --resume {cut}" in error
    assert files == sorted(cut.rglob("*"))


def test_a_folder_without_a_name_is_not_used(script, capsys) -> None:
    error = refused(script, capsys, TrainConfig(**RUN, output_dir=""))
    assert error == "error: output_dir: expected a folder, got ''\n"


def test_a_folder_with_checkpoints_of_others_is_not_used(script, tmp_path, capsys) -> None:
    """Such as those of transformers' Trainer, which have the same names."""
    (tmp_path / "checkpoint-500").mkdir()
    error = refused(script, capsys, TrainConfig(**RUN, output_dir=str(tmp_path)))
    assert "output_dir: expected a folder without checkpoints" in error


def test_a_run_that_has_ended_does_not_go_on(script, cut, capsys, monkeypatch) -> None:
    script.main(TrainConfig(resume=str(cut)))
    monkeypatch.setattr(script, "load_policy", None)
    assert "has ended after its last step" in refused(script, capsys, TrainConfig(resume=str(cut)))


def test_settings_come_from_the_folder(cut, tmp_path, capsys) -> None:
    assert TrainConfig(resume=str(cut)).learning_rate == RUN["learning_rate"]
    with pytest.raises(ValueError, match="learning_rate: expected no flag beside resume, whose"):
        TrainConfig(resume=str(cut), learning_rate=0.1)
    with pytest.raises(SystemExit):  # also a flag with its default
        parse_flags(["--resume", str(cut), "--seed", "0"])
    assert "resume: expected no flag beside it, got --resume --seed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="resume: expected the folder of a run"):
        TrainConfig(resume=str(tmp_path))
    (cut / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="resume: expected the settings"):
        TrainConfig(resume=str(cut))


def test_other_examples_are_another_run(script, cut, capsys) -> None:
    error = refused(script, capsys, TrainConfig(resume=str(cut)), arithmetic_task(1, 8))
    assert "resume: expected the examples of the run" in error


@pytest.mark.parametrize("file", ["training.safetensors", "training.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "foreign"])
def test_a_checkpoint_that_is_not_whole_is_named(script, cut, capsys, file, damage) -> None:
    path = cut / "checkpoint-3" / file
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else b'{"a": 1}')
    error = refused(script, capsys, TrainConfig(resume=str(cut)))
    assert (
        f"resume: expected training.safetensors and training.json of a run in {path.parent}"
        in error
    )


def test_a_run_that_fails_before_it_goes_on_keeps_its_model(script, cut, monkeypatch) -> None:
    trained = load_file(cut / "checkpoint" / "model.safetensors")

    def full(*_) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(script.MasterAdamW, "load_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        script.main(TrainConfig(resume=str(cut)))
    kept = load_file(cut / "checkpoint" / "model.safetensors")
    assert all(torch.equal(trained[name], kept[name]) for name in trained)


def test_a_report_that_is_cut_is_named(script, cut, capsys) -> None:
    (cut / "result.json").write_text('{"whole": ')
    error = refused(script, capsys, TrainConfig(resume=str(cut)))
    assert f"resume: expected the report of a run in {cut / 'result.json'}" in error


def test_a_report_that_fails_costs_no_checkpoint(script, lengths, tmp_path, monkeypatch) -> None:
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastgrpo.train.run.write_report", full)
    cut_run(script, lengths, tmp_path)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2, 3]
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()


def test_two_runs_do_not_share_a_folder(script, cut, capsys, monkeypatch) -> None:
    train, errors = script.train, []

    def twice(*given) -> None:
        errors.append(refused(script, capsys, TrainConfig(resume=str(cut))))
        train(*given)

    monkeypatch.setattr(script, "train", twice)
    assert script.main(TrainConfig(resume=str(cut))) == 0
    assert f"output_dir: another process trains in {cut}" in errors[0]


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_run_that_came_between_is_found(script, cut, tmp_path, capsys, monkeypatch, goes_on):
    """A second process looked at the folder, and was still loading when the first one trained."""
    folder = cut if goes_on else tmp_path / "new"
    given = {"resume": str(folder)} if goes_on else {**RUN, "output_dir": str(folder)}
    newest_state = script.newest_state

    def slowly(*looked_at):
        monkeypatch.setattr(script, "newest_state", newest_state)
        found = newest_state(*looked_at)
        assert script.main(TrainConfig(**given)) == 0
        return found

    monkeypatch.setattr(script, "newest_state", slowly)
    error = refused(script, capsys, TrainConfig(**given))
    assert f"output_dir: another process has trained in {folder} meanwhile" in error
    assert len(read_metrics(folder)) == RUN["max_steps"]


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_found_at_once(
    script, capsys, tmp_path, monkeypatch, name
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(script, "load_policy", None)
    config = TrainConfig(**RUN, output_dir=str(tmp_path / name))
    error = refused(script, capsys, config)
    assert f"output_dir: expected a folder that can be written, got {tmp_path / name}" in error


def test_a_disk_that_makes_no_folder_is_one_line(script, capsys, tmp_path, monkeypatch) -> None:
    def full(folder, *_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    error = refused(script, capsys, TrainConfig(**RUN, output_dir=str(tmp_path / "run")))
    assert "output_dir: expected a folder that can be written" in error and "No space left" in error


# ---- signals and kills -------------------------------------------------------------------------


def test_signals_are_heeded_where_they_can_be() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                interrupt.safe_point()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            interrupt.safe_point()
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_run_in_another_thread_takes_no_signals(script, lengths, tmp_path) -> None:
    codes = []
    config = TrainConfig(**RUN | {"max_steps": 1}, output_dir=str(tmp_path))
    thread = threading.Thread(target=lambda: codes.append(script.main(config, lengths)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_signal_while_the_end_is_saved_interrupts_nothing(script, tmp_path, monkeypatch) -> None:
    """The run has ended by itself: a code that asks for another start would have it refused."""
    report = runs.write_report

    def signalled(*given, **more) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        report(*given, **more)

    monkeypatch.setattr(runs, "write_report", signalled)
    assert script.main(TrainConfig(**RUN | {"max_steps": 1}, output_dir=str(tmp_path))) == 0
    assert json.loads((tmp_path / "result.json").read_text())["whole"]


def newest(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max((step for step, _ in checkpoint.checkpoints(folder)), default=0)


@pytest.mark.slow
def test_a_run_that_is_killed_thirty_times_ends_with_the_same_bits(tmp_path) -> None:
    """At random moments, also while a checkpoint is written: one is written after every step."""
    flags = [
        part
        for name, value in (RUN | {"max_steps": 150, "checkpoint_every": 1}).items()
        for part in (f"--{name.replace('_', '-')}", value)
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments, environment = command(*flags, "--output-dir", whole)
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    arguments, _ = command(*flags, "--output-dir", killed)
    rng = random.Random(0)
    for _ in range(30):
        before = newest(killed)
        with subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while newest(killed) == before:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
        arguments, _ = command("--resume", killed)
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(what_is_learnt(whole), what_is_learnt(killed), strict=True):
        if isinstance(ours, dict):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        else:
            assert ours == theirs
