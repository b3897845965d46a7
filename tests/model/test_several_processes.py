"""Two processes train as one does: DDP, FSDP2, a head that is gathered by hand; gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANK = Path(__file__).with_name("rank.py")
CASES = ["ddp", "ddp-empty", "fsdp-own-unit", "fsdp-tied", "gathered"]
SLOW = [
    "ddp-deferred", "fsdp", "fsdp-deferred", "fsdp-own-unit-deferred", "fsdp-own-unit-empty",
    "ddp-lora", "fsdp-lora", "fsdp-own-unit-lora", "ddp-support", "fsdp-own-unit-support",
]  # fmt: skip


def train(case: str, folder: Path, processes: int) -> dict[str, torch.Tensor]:
    command = [sys.executable, str(RANK), case, str(folder)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command[1:1] = launcher
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / f"{case}-{processes}.pt")


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_two_processes_are_one(case, tmp_path):
    alone, together = (train(case, tmp_path, processes) for processes in (1, 2))
    assert alone.keys() == {name.removeprefix("module.") for name in together}
    if "lora" in case:
        assert any("lm_head.lora_B" in name for name in alone)
    for name, exact in alone.items():
        actual = together.get(name, together.get(f"module.{name}"))
        torch.testing.assert_close(actual, exact, rtol=1e-5, atol=2e-6, msg=name)
