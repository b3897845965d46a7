"""A policy in parts, in one process; test_several_processes.py has two."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from fastgrpo.train import checkpoint
from fastgrpo.train.config import TrainConfig

from .conftest import TINY_RUN, read_metrics

RUN = TINY_RUN | {
    "fsdp": True,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 1,
    "checkpoint_every": 2,
    "beta": 0.1,
    "ref_model_sync_steps": 3,
}


def norms(folder: Path) -> list[float]:
    return [row["grad_norm"] for row in read_metrics(folder)]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        # A supervised start ends with weights that are rounded, but for those in parts.
        {"dtype": "bfloat16", "gradient_checkpointing": True, "warmup_steps": 0},
        {"dtype": "bfloat16", "lora_rank": 2},
        pytest.param({"untied": True, "top_p": 0.9, "num_iterations": 2}, marks=pytest.mark.slow),
    ],
    ids=["", "bf16", "bf16 lora", "untied"],
)
def test_parts_learn_what_a_whole_does(
    script, alone, lengths, tmp_path, model_folder, flags
) -> None:
    """To the bit, as all parts lie in one process; so does a run that was cut."""
    if flags.keys() & {"untied", "lora_rank"}:
        flags = flags | {"model": str(model_folder), "warmup_steps": 0}
        flags.pop("untied", None)
    whole, parts, cut = (tmp_path / name for name in ("whole", "parts", "cut"))
    for folder, fsdp in ((whole, False), (parts, True)):
        script.main(TrainConfig(**RUN | flags | {"fsdp": fsdp}, output_dir=str(folder)), lengths)
    shutil.copytree(parts, cut)
    (cut / "result.json").unlink()
    shutil.rmtree(cut / "checkpoint-4")
    script.main(TrainConfig(resume=str(cut)), lengths)
    (file,) = (whole / "checkpoint").glob("*.safetensors")
    expected = load_file(file)
    for folder in (parts, cut):
        found = load_file(folder / "checkpoint" / file.name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items())
        assert norms(folder) == norms(whole)
    assert len(norms(whole)) == 4 and min(norms(whole)) > 0
    for file in (whole / "checkpoint").iterdir():
        assert file.read_bytes() == (parts / "checkpoint" / file.name).read_bytes()


@pytest.fixture
def cut(script, alone, tmp_path) -> Path:
    """A run that was cut after two of four steps."""
    script.main(TrainConfig(**RUN, output_dir=str(tmp_path)))
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-4")
    return tmp_path


@pytest.mark.parametrize("damage", ["cut", "gone", "smaller"])
def test_parts_that_are_not_whole_are_named(script, cut, capsys, damage) -> None:
    """What no file holds would be loaded as whatever the memory held."""
    (file,) = (cut / "checkpoint-2" / "parts").iterdir()
    assert file.suffix == ".safetensors"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        values = (cut / "checkpoint-2" / "training.json").read_text()
        (cut / "checkpoint-2" / "training.json").write_text(values.replace("[128]", "[129]", 1))
    with pytest.raises(SystemExit):
        script.main(TrainConfig(resume=str(cut)))
    error = capsys.readouterr().err
    assert f"resume: expected training.safetensors and training.json of a run in {cut}" in error
    if damage == "gone":
        assert "expected all parts of" in error


def test_parts_that_cannot_be_written_leave_the_checkpoint_before(
    script, alone, tmp_path, capsys, monkeypatch
) -> None:
    write = HuggingFaceStorageWriter.write_data

    def full(writer, *given):
        if "checkpoint-4" in str(writer.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(writer, *given)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    assert script.main(TrainConfig(**RUN, output_dir=str(tmp_path))) == 0
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [2]
    assert not list(tmp_path.glob("*.tmp"))
    said = f"{tmp_path / 'checkpoint-4'} could not be written, all else goes on: OSError("
    error = capsys.readouterr().err
    assert said in error and "No space left" in error.partition(said)[2]


def test_one_process_without_torchrun_has_no_parts(script, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(script, "load_policy", None)
    with pytest.raises(SystemExit):
        script.main(TrainConfig(**RUN, output_dir=str(tmp_path / "run")))
    assert "error: fsdp: expected processes that torchrun has started" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_memory_that_runs_out_ends_the_run(script, alone, tmp_path, monkeypatch) -> None:
    """The other processes are in the middle of the pass, and wait."""

    def full(*_) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(script.MasterAdamW, "backward", full)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        script.main(TrainConfig(**RUN | {"warmup_steps": 0}, output_dir=str(tmp_path)))
    assert not checkpoint.checkpoints(tmp_path)
