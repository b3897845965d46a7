"""Two processes, DDP and FSDP2, and another version of TRL: each in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")
pytest.importorskip("peft")

from trl_runs import save_tiny_model  # noqa: E402

SCRIPT = Path(__file__).with_name("child_runs.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def results(runs, output, launcher=(), first=(), **environment):
    """What each rank saves. `first` are folders to import from before all others."""
    save_tiny_model(output / "tied")
    save_tiny_model(output / "untied", tied=False)
    paths = [*map(str, first), *map(os.path.abspath, filter(None, sys.path))]
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), runs, str(output)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"rank{i}.pt") for i in range(2 if launcher else 1)]


def assert_same(ranks, name):
    """What ranks log is what stock TRL's log, and their parameters are the same."""
    stock = ranks[0][name, "stock"]
    assert len(stock["logged"]) == 4 and stock["gaps"] == []
    assert max(entry["kl"] for entry in stock["logged"]) > 0.1
    for kind in ("patched", "fused"):
        ours = ranks[0][name, kind]
        assert ours["ranks"] == len(ranks) and len(ours["gaps"]) == (8 if kind == "fused" else 0)
        for theirs, step in zip(stock["logged"], ours["logged"], strict=True):
            assert step == pytest.approx(theirs, rel=1e-5, abs=1e-6), (name, kind)
        torch.testing.assert_close(ours["parameters"], stock["parameters"], rtol=1e-4, atol=1e-5)
        for other in ranks[1:]:
            assert torch.equal(ours["parameters"], other[name, kind]["parameters"])


def test_ddp(tmp_path):
    ranks = results("ddp", tmp_path, TWO)
    for name in ("grpo", "lora"):
        assert_same(ranks, name)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return results("fsdp", tmp_path_factory.mktemp("fsdp"), TWO)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dapo", "grpo", "lora"])
def test_fsdp2(sharded, name):
    assert_same(sharded, name)


@pytest.mark.slow
def test_a_trained_head_that_fsdp2_shards_by_itself_is_refused(sharded):
    """TRL trains it with gradients of one rank."""
    for rank in sharded:
        assert "logged" in rank["copy of the head", "stock"]
        for kind in ("patched", "fused"):
            assert "sharded by itself" in rank["copy of the head", kind]["error"]


@pytest.mark.slow
def test_log_probs_leave_fsdp2_unrounded(sharded):
    """The second batch starts at step 3: there the policy is the old one again."""
    gaps = sharded[0]["bf16", "fused"]["gaps"]
    assert len(gaps) == 8
    for first, then in ((0, 2), (4, 6)):
        assert max(gaps[first : first + 2]) < 1e-6 and min(gaps[then : then + 2]) > 0.1


@pytest.fixture(scope="module")
def trl_1_15(tmp_path_factory) -> Path:
    """A folder with TRL 1.15 alone; what it imports is this environment's."""
    folder = tmp_path_factory.mktemp("trl-1.15")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder),
         "trl==1.15.*"],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say(f"trl 1.15 cannot be installed: {done.stderr[-500:]}")
    return folder


@pytest.mark.slow
def test_trl_1_15(trl_1_15, tmp_path):
    """Its own log-probs need Triton's interpreter on a CPU; ours are of the torch backend."""
    environment = {"TRITON_INTERPRET": "1", "FASTGRPO_BACKEND": "torch"}
    ranks = results("alone", tmp_path, first=[trl_1_15], **environment)
    assert ranks[0]["version"].startswith("1.15.")
    for name in ("dapo", "grpo", "lora"):
        assert_same(ranks, name)
