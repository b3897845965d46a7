"""Two processes that torchrun starts give what one gives."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fastgrpo.train import ranks
from fastgrpo.train.catalogue import load_task
from fastgrpo.train.checkpoint import checkpoints
from fastgrpo.train.config import TrainConfig, one_line_errors
from fastgrpo.train.not_finite import DUMP, STEPS
from fastgrpo.train.reward_process import STARTING
from fastgrpo.train.scoring import PATIENCE

from .conftest import SCRIPT, command, read_metrics
from .rank import updates

REWARD = """
def length(completions, prompts):
    return [0.0 if "9" in p else float(len(c)) for c, p in zip(completions, prompts)]
"""
FLAGS = {
    "device": "cpu", "backend": "torch", "max_steps": 4, "warmup_steps": 2, "eval_size": 9,
    "eval_every": 2, "num_prompts": 5, "num_generations": 4, "max_tokens_per_microbatch": 64,
    "learning_rate": 1e-3, "lr_warmup_steps": 1, "checkpoint_every": 2, "beta": 0.0,
}  # fmt: skip
TIMES = {"tokens_per_s", "eval_seconds"}
SLOW = """
import runpy, sys, time
from fastgrpo.train import checkpoint

write = checkpoint._write_model
checkpoint._write_model = lambda *given: (time.sleep(3), write(*given))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

FAULTS = """
import errno, runpy, sys
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from fastgrpo.train import checkpoint, ranks
from fastgrpo.train.optimizer import MasterAdamW

whole, write, step = checkpoint.whole, HuggingFaceStorageWriter.write_data, MasterAdamW.step


def no_folder(folder):
    if folder.name == "checkpoint-1":
        raise OSError(errno.ENOSPC, "planted: no folder")
    return whole(folder)


def full(writer, *given):
    if ranks.rank() == 1 and "checkpoint-2" in str(writer.path):
        raise OSError(errno.ENOSPC, "planted: no space left")
    return write(writer, *given)


def failing(optimizer, *given):
    if ranks.rank() == 0 and optimizer.over_ranks and optimizer.updates == 3:
        raise RuntimeError("planted in the fourth step")
    return step(optimizer, *given)


checkpoint.whole = no_folder
HuggingFaceStorageWriter.write_data, MasterAdamW.step = full, failing
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


NAN = """
import math, runpy, sys
from fastgrpo.train import ranks

mean, losses = ranks.mean, []


def planted(loss):
    losses.append(mean(loss) if len(losses) < 2 else math.nan)
    return losses[-1]


ranks.mean = planted
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> Path:
    """A file with a reward that is the same for all completions of many prompts."""
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(REWARD)
    return path


def started(
    processes: int,
    *arguments: object,
    before: tuple[str, ...] = (),
    script: Path = SCRIPT,
    under_torchrun: bool = False,
) -> subprocess.Popen:
    """The script in so many processes, run by another that stands ``before`` it."""
    (python, _, *rest), environment = command(*arguments)
    rest = [*before, str(script), *rest]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    line = [python, *(torchrun if processes > 1 or under_torchrun else ()), *rest]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, env=environment, **pipes)


def run(processes: int, *arguments: object, **options: Any) -> str:
    """What the script has printed."""
    with started(processes, *arguments, **options) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def one(tmp_path_factory, reward) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    run(1, *flags(folder, reward))
    return folder


def flags(folder: Path, reward: Path, **others: object) -> list[object]:
    given = FLAGS | others | {"output_dir": folder, "reward": f"{reward}:length"}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def without_the_end(folder: Path, copy: Path) -> Path:
    """A copy of a run, cut after two of four steps."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoint-4")
    (copy / "result.json").unlink()
    return copy


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_training(folder: Path, other: Path, exact: bool = False) -> None:
    weights = [load_file(f / "checkpoint" / "model.safetensors") for f in (folder, other)]
    joined = [torch.cat([w[name].flatten() for name in sorted(w)]) for w in weights]
    error = (joined[0] - joined[1]).norm() / joined[0].norm()
    assert error <= (0 if exact else 1e-5)
    rows = [read_metrics(f) for f in (folder, other)]
    assert len(rows[0]) == len(rows[1]) == FLAGS["max_steps"]
    for row, again in zip(*rows, strict=True):
        assert row.keys() == again.keys()
        for name in row.keys() - TIMES:
            bar = {"rel": 0, "abs": 0} if exact else {"rel": 2e-3, "abs": 2e-5}
            assert row[name] == pytest.approx(again[name], **bar), name
    results = [json.loads((f / "result.json").read_text()) for f in (folder, other)]
    for name in ("reward_before", "reward_after"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-6)


@pytest.mark.parametrize("fsdp", [False, True], ids=["copies", "parts"])
def test_two_processes_train_as_one(tmp_path, reward, one, fsdp) -> None:
    """Five prompts are two and three, nine held-out ones four and five; some groups are flat."""
    printed = run(2, *flags(tmp_path / "two", reward, fsdp=fsdp))
    assert printed.count("step 4 | reward") == 1 and printed.count("saved in") == 1
    assert_same_training(one, tmp_path / "two")
    assert any(0 < row["flat_groups"] < 1 for row in read_metrics(one))
    assert names(one) == names(tmp_path / "two")
    assert names(one / "checkpoint") == names(tmp_path / "two" / "checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize(
    "others",
    [
        {"num_iterations": 2, "loss": "dapo", "beta": 0.1, "ref_model_sync_steps": 2},
        {"resample_flat_groups": 2, "top_p": 0.9, "gradient_checkpointing": True},
    ],
    ids=["two updates with a reference", "flat groups drawn again under top-p"],
)
def test_two_processes_train_as_one_with(tmp_path, reward, others) -> None:
    run(1, *flags(tmp_path / "one", reward, **others))
    for fsdp in (False, True):
        folder = tmp_path / str(fsdp)
        run(2, *flags(folder, reward, **others, fsdp=fsdp))
        assert_same_training(tmp_path / "one", folder)


def test_two_processes_take_the_updates_of_one(tmp_path, model_folder) -> None:
    """Where one has ten times as many tokens, all the advantages, and a loss that is NaN."""
    run(2, model_folder, tmp_path / "found", script=Path(__file__).with_name("rank.py"))
    expected = updates(str(model_folder))
    both = torch.load(tmp_path / "found", weights_only=True)
    assert both["copies"]["shares"] == [1, 1]
    assert both["parts"]["shares"] == pytest.approx([0.5, 0.5], abs=0.02)
    for found in both.values():
        for gradient, exact in zip(found["gradients"], expected["gradients"], strict=True):
            assert (gradient - exact).norm() <= 1e-6 * exact.norm()
        exact = expected["weights"]
        assert (found["weights"] - exact).norm() <= 1e-5 * exact.norm()
        for metrics, alone in zip(found["metrics"], expected["metrics"], strict=True):
            assert metrics == pytest.approx(alone, rel=1e-4, abs=1e-6, nan_ok=True)
    assert [metrics["skipped"] for metrics in expected["metrics"]] == [0, 0, 0, 1]
    assert all(metrics["grad_norm"] > 0.05 for metrics in expected["metrics"][:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fsdp", "before"), [(False, 2), (True, 2), (True, 1)], ids=["copies", "parts", "all parts"]
)
def test_a_run_goes_on_in_two_processes_or_in_one(tmp_path, reward, fsdp, before) -> None:
    whole = tmp_path / "whole"
    run(before, *flags(whole, reward, keep=9, fsdp=fsdp, beta=0.1), under_torchrun=fsdp)
    for processes in (2, 1):
        cut = without_the_end(whole, tmp_path / str(processes))
        run(processes, "--resume", cut, under_torchrun=fsdp)
        assert_same_training(whole, cut, exact=processes == before)
    if fsdp and before == 2:
        cut = without_the_end(whole, tmp_path / "damaged")
        (cut / "checkpoint-2" / "parts" / "shard-00002-model-00001-of-00001.safetensors").unlink()
        with started(2, "--resume", cut) as process:
            output, _ = process.communicate(timeout=120)
        assert process.returncode != 0 and output.count("expected all parts of") == 1


@pytest.mark.slow
def test_parts_survive_a_full_disk_and_an_error_in_one_process(tmp_path, reward, one) -> None:
    """First the one that names folders has no room, then the other; then the first fails."""
    (tmp_path / "faults.py").write_text(FAULTS)
    folder = tmp_path / "run"
    arguments = flags(folder, reward, fsdp=True, checkpoint_every=1)
    with started(2, *arguments, before=(str(tmp_path / "faults.py"),)) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode != 0 and "RuntimeError: planted in the fourth step" in output
    for name in ("checkpoint-1", "checkpoint-2"):
        assert f"{folder / name} could not be written, all else goes on" in output
    assert "the model is not saved: parts of it lie in other processes" in output
    assert [step for step, _ in checkpoints(folder)] == [3]
    assert not (folder / "checkpoint").exists() and not list(folder.glob("*.tmp"))
    run(2, "--resume", folder)
    assert_same_training(one, folder)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["copies", "parts"])
def test_processes_that_all_end_as_no_loss_is_finite_save(tmp_path, reward, fsdp) -> None:
    """The model, a checkpoint of the last whole step, and the completions of all."""
    (tmp_path / "nan.py").write_text(NAN)
    folder = tmp_path / "run"
    arguments = flags(folder, reward, max_steps=20, checkpoint_every=0, fsdp=fsdp)
    with started(2, *arguments, before=(str(tmp_path / "nan.py"),)) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode != 0 and f"are in {folder / DUMP}" in output, output
    assert [step for step, _ in checkpoints(folder)] == [2 + STEPS - 1], output
    assert "NotFiniteError" in json.loads((folder / "result.json").read_text())["error"]
    weights = load_file(folder / "checkpoint" / "model.safetensors")
    assert all(x.isfinite().all() for x in weights.values())
    dump = load_file(folder / DUMP)
    found = [len(dump[name]) for name in ("lengths", "process1.lengths")]
    assert found == [n * FLAGS["num_generations"] for n in (2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["copies", "parts"])
def test_a_signal_to_one_process_ends_all(tmp_path, reward, fsdp) -> None:
    """While the first writes the other must not end: torchrun would then kill the first."""
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = flags(tmp_path / "run", reward, max_steps=10**6, checkpoint_every=0, fsdp=fsdp)
    with started(2, *arguments, before=(str(tmp_path / "slow.py"),)) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and read_metrics(metrics.parent)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        found = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", found[-1]], check=True)
        output, _ = process.communicate(timeout=120)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["interrupted"], output
    assert (tmp_path / "run" / f"checkpoint-{result['steps']}").exists(), output


def test_what_several_processes_cannot_have_is_one_line(tmp_path, reward) -> None:
    """Once, with nothing but torchrun's own report behind it."""
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name")
    for given, message in (
        (flags(tmp_path / "run", reward, num_prompts=1), "num_prompts: expected one for each of 2"),
        (flags(tmp_path / "run", broken), "reward: expected that broken.py runs, got ModuleNot"),
    ):
        with started(2, *given) as process:
            output, _ = process.communicate(timeout=120)
        ours = re.split("^(?:[EW][0-9]{4} |Traceback)", output, maxsplit=1, flags=re.MULTILINE)[0]
        assert process.returncode != 0 and ours.startswith(f"error: {message}"), output
        assert ours.count("\n") == 1, output
        assert not (tmp_path / "run").exists()


def test_losses_that_several_processes_cannot_have_are_named(monkeypatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    for loss, message in (
        ("importance_sampling", "loss: expected one that takes a mean"),
        ("clip_cov", "loss: expected one that does not compare the completions"),
    ):
        with pytest.raises(ValueError, match=message):
            ranks.check(TrainConfig(loss=loss, device="cpu"))


def test_an_error_of_another_process_is_printed_by_the_first(monkeypatch, capsys) -> None:
    monkeypatch.setattr(ranks, "gathered", lambda item: [item, "error: planted", "error: planted"])
    with pytest.raises(SystemExit) as ended, one_line_errors():
        pass
    assert ended.value.code == 2 and capsys.readouterr().err == "error: planted\n"


def test_processes_wait_as_long_as_rewards_may_hang(alone, config, policy, reward) -> None:
    """Two calls of one reward, one for the accuracy, each for a batch and three alone."""
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    before = backend.options._timeout.total_seconds()
    config.reward, config.reward_timeout = [f"{reward}:length"], 50.0
    load_task(config, policy.tokenizer)
    longer = backend.options._timeout.total_seconds() - before
    assert longer == 2 * (1 + PATIENCE) * (STARTING + 50)


@pytest.fixture
def second_of_two(monkeypatch) -> list[int]:
    """The second of two processes on a machine with one GPU; the devices that it has set."""
    devices = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_: None)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    return devices


def test_a_process_takes_the_gpu_of_its_number_if_there_is_one(second_of_two, monkeypatch) -> None:
    with ranks.processes():
        ranks.check_device("cpu")
        for device in ("auto", "cuda"):
            with pytest.raises(ValueError, match="device: expected a GPU for each .* which has 1"):
                ranks.check_device(device)
    assert second_of_two == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with ranks.processes():
        ranks.check_device("cuda")
    assert second_of_two == [1]


def test_a_size_that_a_cluster_has_set_starts_no_processes(monkeypatch) -> None:
    """Without torchrun a process would take itself for the only one, or wait for the others."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with ranks.processes():
        assert not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="expected torchrun on each .* got WORLD_SIZE 2"):
        with ranks.processes():
            pass


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "cpu:0"])
def test_several_processes_share_no_device(second_of_two, device) -> None:
    with pytest.raises(ValueError, match=f"device: expected cuda or cpu, .* got {device}"):
        ranks.check(TrainConfig(device=device))
