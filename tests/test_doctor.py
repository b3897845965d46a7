"""`python -m fastgrpo.doctor`: one screen, a status, and verdicts that calls then read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fastgrpo_kernels
from fastgrpo import doctor, torch_kernels
from fastgrpo.dispatch import choice
from fastgrpo.dispatch.self_check import MODES, Figure
from fastgrpo.dispatch.trial import FAULT
from fastgrpo_kernels import Head, Rows
from fastgrpo_kernels.child import Ended
from fastgrpo_kernels.runtime import HAS_TRITON, INTERPRETED

GOOD = [Figure("logps", 1e-6, 2e-5), Figure("dweight in the forward", 1e-3, 4e-3)]
BAD = [*GOOD, Figure("entropy", 1e-3, 2e-5)]
OF_A_MODE = {
    "sparse": Figure("dhidden sparse", 0.5, 3e-2),
    "support": Figure("support logps", 0.5, 1e-4),
}


def printed(figures):
    return ["something a library says", *(json.dumps(figure._asdict()) for figure in figures)]


ENDINGS = {
    "good": Ended(0, "", printed(GOOD)),
    "bad": Ended(0, "", printed(BAD)),
    **{mode: Ended(0, "", printed([*GOOD, figure])) for mode, figure in OF_A_MODE.items()},
    "hangs": Ended(None, "did not end within 120 s", printed(GOOD), timed_out=True),
    "dies": Ended(-6, "was ended by SIGABRT", ["LLVM ERROR"]),
    "faults": Ended(FAULT, "ended with status 4", ["AcceleratorError: an illegal memory access"]),
    "no memory": Ended(1, "ended with status 1", ["OutOfMemoryError: CUDA out of memory"]),
    "killed": Ended(-9, "was ended by SIGKILL", []),
    "no start": Ended(None, "did not start: [Errno 28] No space left on device", []),
}


@pytest.fixture
def examined(monkeypatch, tmp_path, capsys):
    """What the doctor prints and returns where kernels end in some way; "good" by default."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("FASTGRPO_BACKEND", "FASTGRPO_ANCHORED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        doctor, "_kernels", lambda device, dtypes: ["anchored", "portable", "torch"]
    )

    def run(endings=()):
        def run_python(arguments, seconds):
            _, module, device, kernels, *dtypes = arguments
            assert module == "fastgrpo.dispatch.trial" and device == "cpu" and seconds > 0
            return ENDINGS[dict(endings).get((kernels, *dtypes), "good")]

        monkeypatch.setattr(doctor, "run_python", run_python)
        return doctor.main(), capsys.readouterr().out

    return run


@pytest.fixture
def call(monkeypatch):
    """The kernels that a call of bf16 operands gets after the doctor; nothing else is checked."""
    monkeypatch.setattr(choice, "obstacle", lambda device: "")
    monkeypatch.setattr(choice, "INTERPRETED", False)
    monkeypatch.setattr(fastgrpo_kernels, "has_anchored", lambda rows, head: True)
    like = torch.ones(2, 4, dtype=torch.bfloat16)
    scored = Rows(like, torch.zeros(2, dtype=torch.int64)), Head(like)

    def kernels(checked, mode="dense"):
        monkeypatch.setattr(choice, "_verdicts", {})
        monkeypatch.setattr(choice.self_check, "figures", lambda *_: checked.append(1) or GOOD)
        return choice.run(lambda kernels: kernels, "auto", like, scored, mode)

    return kernels


def starred(text):
    """Operands -> what auto takes for them."""
    rows = [line[2:] for line in text.splitlines() if line.startswith("* ")]
    return {row[:23].strip(): row[23:].split()[0] for row in rows if "taken by" not in row}


def test_a_healthy_machine(examined, call):
    status, text = examined()
    assert status == 0 and "Nothing is wrong." in text and "WRONG" not in text
    assert len(text.splitlines()) <= 45 and max(map(len, text.splitlines())) <= 120
    assert set(starred(text).values()) == {"anchored"} and len(starred(text)) == 6
    assert torch.__version__ in text and "trl" in text
    checked = []
    assert all(call(checked, mode) is fastgrpo_kernels for mode in MODES)
    assert not checked, "the doctor has left verdicts"


@pytest.mark.parametrize("how, said", [
    ("bad", "entropy off by 1.0e-03 (allowed: 2e-05)"),
    ("hangs", "did not end within 120 s after dweight in the forward"),
    ("dies", "was ended by SIGABRT; its last line: LLVM ERROR"),
    ("faults", "its last line: AcceleratorError: an illegal memory access"),
])  # fmt: skip
def test_kernels_that_are_wrong_or_hang_are_never_called(examined, call, how, said):
    status, text = examined({("anchored", "bfloat16", "bfloat16"): how})
    assert status == 1 and "WRONG: anchored, bfloat16 on cpu: " in text and said in text
    assert starred(text)["bfloat16"] == "torch" and starred(text)["float16"] == "anchored"
    expected = "wrong numbers: entropy" if how == "bad" else "the self-test"
    with pytest.warns(RuntimeWarning, match=f"{expected}.*python -m fastgrpo.doctor checks again"):
        assert call([]) is torch_kernels
    assert examined()[0] == 0
    assert call([]) is fastgrpo_kernels, "a later examination found nothing"


@pytest.mark.parametrize("mode", OF_A_MODE)
def test_a_sparse_backward_or_a_support_fails_alone(examined, call, mode):
    status, text = examined({("anchored", "bfloat16", "bfloat16"): mode})
    assert status == 1 and "5e-01 !" in text and starred(text)["bfloat16"] == "anchored"
    for other in {*MODES} - {mode}:
        assert call([], other) is fastgrpo_kernels
    with pytest.warns(RuntimeWarning, match=OF_A_MODE[mode].name):
        assert call([], mode) is torch_kernels


@pytest.mark.parametrize("how, said", [
    ("no memory", "CUDA out of memory"), ("killed", "SIGKILL"), ("no start", "No space left"),
])  # fmt: skip
def test_an_accident_leaves_no_verdict(examined, call, how, said):
    status, text = examined({("anchored", "bfloat16", "bfloat16"): how})
    assert status == 1 and said in text
    checked = []
    assert call(checked) is fastgrpo_kernels and checked
    assert starred(text)["bfloat16"] == "portable"


def test_a_wrong_torch_backend_is_a_problem_too(examined):
    status, text = examined({("torch", "float32", "float32"): "bad"})
    assert status == 1 and "WRONG: torch, float32 on cpu: wrong numbers: entropy off" in text


def test_settings_are_shown_and_followed(examined, monkeypatch):
    monkeypatch.setenv("FASTGRPO_ANCHORED", "0")
    status, text = examined()
    assert status == 0 and "FASTGRPO_ANCHORED=0" in text
    assert set(starred(text).values()) == {"portable"}
    monkeypatch.setenv("FASTGRPO_BACKEND", "torch")
    assert set(starred(examined()[1]).values()) == {"torch"}
    monkeypatch.setenv("FASTGRPO_BACKEND", "cuda")
    status, text = examined()
    assert status == 1 and "WRONG: FASTGRPO_BACKEND: expected" in text


def test_triton_without_a_gpu_is_a_problem(examined, monkeypatch):
    monkeypatch.setenv("FASTGRPO_BACKEND", "triton")
    monkeypatch.setattr(doctor, "_kernels", lambda device, dtypes: ["torch"])
    status, text = examined()
    assert status == 1 and "WRONG: FASTGRPO_BACKEND=triton: the Triton kernels need" in text
    assert not starred(text), "calls raise"


def test_a_cache_that_cannot_be_written_is_shown(examined, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    status, text = examined()
    assert status == 0 and "cannot be written" in text


def test_the_command_on_this_machine(tmp_path, monkeypatch):
    """Whole, with its child processes, and without a network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-m", "fastgrpo.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing is wrong." in done.stdout and not done.stderr
    for row in ("bfloat16 ", "float16 ", "float32 ", "bfloat16, head float32 ", "no head "):
        assert f"* {row}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


SMALL = """
import sys
from fastgrpo.dispatch import self_check, trial
self_check.ROWS, self_check.HIDDEN, trial.SIZES = 24, 64, (601, 640)
trial.main("cpu", *sys.argv[1:])
"""


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="starts interpreted processes itself")
@pytest.mark.parametrize("kernels", ["anchored", pytest.param("portable", marks=pytest.mark.slow)])
def test_a_trial_of_real_kernels(monkeypatch, kernels):
    """Interpreted, on a small problem: what the child of a GPU's doctor runs."""
    variables = {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    arguments = ["-c", SMALL, kernels, "bfloat16", "bfloat16"]
    ended = doctor.run_python(arguments, 300.0, variables)
    assert not ended.failure, ended.lines
    figures = [Figure(**json.loads(line)) for line in ended.lines if line.startswith("{")]
    assert len(figures) == 46 and all(figure.holds for figure in figures)


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="compiled kernels")
def test_a_trial_that_cannot_launch_says_nothing_about_kernels():
    planted = (
        "import fastgrpo_kernels\n"
        "from fastgrpo_kernels.runtime import LaunchError\n"
        "def token_loss(*arguments):\n"
        "    raise LaunchError('_token_loss_kernel cannot be launched: no compiler')\n"
        "fastgrpo_kernels.token_loss = token_loss\n"
    )
    ended = doctor.run_python(["-c", planted + SMALL, "portable"], 60.0)
    assert ended.status == 1 and "no compiler" in ended.last_line


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="compiled kernels")
def test_a_trial_that_breaks_a_rule_of_the_device_is_a_fault():
    planted = (
        "import fastgrpo_kernels\n"
        "def token_loss(*arguments):\n"
        "    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "fastgrpo_kernels.token_loss = token_loss\n"
    )
    ended = doctor.run_python(["-c", planted + SMALL, "portable"], 60.0)
    assert ended.status == FAULT


def test_an_interrupted_doctor_ends_its_children(monkeypatch):
    """Ctrl-C does not wait for kernels that hang."""
    ended = []
    monkeypatch.setattr(doctor, "end_all", lambda: ended.append(True))
    monkeypatch.setattr(doctor, "_run", lambda trial: trial)
    trials = doctor._run_all([doctor.Trial(torch.device("cpu"), "torch", ())] * 3)
    next(trials)
    with pytest.raises(KeyboardInterrupt):
        trials.throw(KeyboardInterrupt)
    assert ended
