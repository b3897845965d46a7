"""Which variant of the anchored kernel runs, by the launch table and a trial; without a GPU."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
import warnings

import pytest
import torch

from fastgrpo_kernels import anchored_variant, warp_trial
from fastgrpo_kernels.anchored_variant import PASSED, SWITCH, anchored_launch
from fastgrpo_kernels.runtime import ANCHORED_SMALL_H, LAUNCHES
from fastgrpo_kernels.warp_trial import VARIANTS, Variant

FLATTENED = LAUNCHES["anchored_logps"][16, "sm_90"]
SPECIALISED = LAUNCHES["anchored_logps_small_h"][16, "sm_90"]
HOST = torch.device("cpu")
SUMS = torch.tensor([[1.0, 2e-30]])
ENGAGED = "... ttg.warp_specialize(...) ..."

# ---- what a trial says -------------------------------------------------------------------------


def refusal(specialised, only=VARIANTS):
    """What a trial says if the specialised entry gives these results for some variants."""

    def run(launch, variant):
        if launch is FLATTENED:
            return SUMS, "..."
        if variant not in only:
            return SUMS, ENGAGED
        if isinstance(specialised, Exception):
            raise specialised
        return specialised

    return warp_trial.refusal(run, SPECIALISED, FLATTENED)


def test_a_trial_that_agrees_is_not_refused():
    assert refusal((SUMS * (1 + 1e-6), ENGAGED)) == ""


REFUSED = {
    "the compiler ignored it": (SUMS, "..."),
    "its sums are wrong": (SUMS * 1.001, ENGAGED),
    "its sums are wrong ": (SUMS * torch.nan, ENGAGED),
    "RuntimeError: PassManager::run failed": RuntimeError("PassManager::run failed"),
}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("reason", REFUSED)
def test_why_it_is_refused(reason, variant):
    said = refusal(REFUSED[reason], only=[variant])
    assert f"variant {variant}: " in said and reason.strip() in said


def test_a_race_that_shows_the_last_time_is_refused():
    left = [warp_trial.REPEATS]

    def run(launch, variant):
        left[0] -= launch is SPECIALISED and variant is VARIANTS[0]
        return (SUMS * 2 if left[0] == 0 else SUMS), ENGAGED

    assert "its sums are wrong" in warp_trial.refusal(run, SPECIALISED, FLATTENED)


def test_any_two_options_are_tried_together():
    for i, j in itertools.combinations(range(len(Variant._fields)), 2):
        assert {(variant[i], variant[j]) for variant in VARIANTS} == {
            *itertools.product((False, True), repeat=2)
        }, (Variant._fields[i], Variant._fields[j])
    whole_head = dict(entropy=True, softcap=True, bias=True, temperature=True)
    assert [variant for variant in VARIANTS if variant._asdict().items() >= whole_head.items()]


# ---- the process it runs in --------------------------------------------------------------------


@pytest.fixture
def child(monkeypatch):
    """Puts some code in the place of the trial and returns why warps are then refused."""
    monkeypatch.setattr(anchored_variant, "SECONDS", 60.0)

    def run(code):
        monkeypatch.setattr(anchored_variant, "TRIAL", ("-c", code))
        return anchored_variant.refusal(HOST)

    return run


def test_a_trial_that_hangs_is_ended(child, monkeypatch, tmp_path):
    """And so is what it started, a compiler, say."""
    monkeypatch.setattr(anchored_variant, "SECONDS", 2.0)
    started, outlived = tmp_path / "started", tmp_path / "outlived"
    compiler = f"touch {started}; sleep 3; touch {outlived}"
    begun = time.monotonic()
    reason = child(f"import subprocess; subprocess.run(['sh', '-c', {compiler!r}])")
    assert reason == "its trial did not end within 2 s, it said: nothing"
    assert time.monotonic() - begun < 10
    time.sleep(2)
    assert started.exists() and not outlived.exists()


def test_an_interrupted_wait_ends_the_trial_too(child, monkeypatch, tmp_path):
    outlived = tmp_path / "outlived"

    def interrupted(self, timeout=None):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        child(f"import pathlib, time; time.sleep(1); pathlib.Path({str(outlived)!r}).touch()")
    time.sleep(1.5)
    assert not outlived.exists()


PASSING = f"print({PASSED!r}, flush=True)"
ENDINGS = {
    "was ended by SIGABRT": "import os; os.abort()",
    "was ended by SIGSEGV": f"{PASSING}; import os; os.kill(os.getpid(), 11)",
    f"ended with status 7, it said: {PASSED}": f"{PASSING}; raise SystemExit(7)",
    "ended with status 1, it said: ZeroDivisionError": "1 / 0",
    "ended, it said: nothing": "",
    "ended, it said: \ufffd\ufffd": r"import sys; sys.stdout.buffer.write(b'1\n\n\xff\xfe\0')",
    "ended, it said: not": f"print('not ' + {PASSED!r})",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_trial_that_does_not_end_well(child, ending):
    assert ending in child(ENDINGS[ending])


def test_a_trial_that_passes_whatever_else_is_printed(child):
    noise = "import sys; print('loading'); {}; print('bye', file=sys.stderr)"
    assert child(noise.format(PASSING)) == ""


def test_a_trial_that_does_not_start(child, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert "did not start" in child(PASSING)


def test_it_finds_what_this_process_finds(child, monkeypatch, tmp_path):
    (tmp_path / "only_here.py").write_text(PASSING)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "No module named" in child("import only_here")
    monkeypatch.syspath_prepend(tmp_path)
    assert child("import only_here") == ""


def test_it_is_not_asked_to_specialise_warps(child, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    assert child(f"import os; print('switch', os.environ[{SWITCH!r}])").endswith("switch 0")


def test_the_trial_itself_needs_a_gpu(monkeypatch):
    """The command that runs where nothing is planted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "RuntimeError: the Triton kernels" in anchored_variant.refusal(HOST)


PLANTED = f"""
import sys
import torch
from fastgrpo_kernels import warp_trial

def sums_of(device, launch, variant):
    specialised = launch.blocks["WARP_SPECIALIZE"]
    factor = {{}} if specialised and variant.fp16 else 1.0
    return torch.full((1, 2), factor), {ENGAGED!r} if specialised else ""

warp_trial.architecture = lambda device: "sm_90"
warp_trial.sums_of = sums_of
warp_trial.main(sys.argv[1])
"""


@pytest.mark.parametrize("factor, said", [(1.0, ""), (1.5, "fp16, bias, temperature, narrow: its")])
def test_what_the_trial_says_arrives(child, factor, said):
    reason = child(PLANTED.format(factor))
    assert said in reason and bool(said) == bool(reason)


# ---- which entry is taken ----------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """Launches as on sm_90, with a trial that counts and can be told to fail."""
    calls, reason = [], [""]

    def tried(device):
        calls.append(device)
        return reason[0]

    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(anchored_variant, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(anchored_variant, "refusal", tried)
    monkeypatch.setattr(anchored_variant, "_REFUSED", {})
    return calls, reason


def chosen(hidden_size, scores_only=True):
    return anchored_launch(torch.empty(4, hidden_size, dtype=torch.bfloat16), scores_only)


def test_the_table_says_where(hopper):
    assert chosen(ANCHORED_SMALL_H) is SPECIALISED
    assert chosen(ANCHORED_SMALL_H + 64) is FLATTENED
    assert chosen(64, scores_only=False) is FLATTENED


def test_it_must_be_asked_for(hopper, monkeypatch):
    """At each launch, and without a trial where nobody asks."""
    calls, _ = hopper
    monkeypatch.delenv(SWITCH)
    assert chosen(1024) is FLATTENED
    monkeypatch.setenv(SWITCH, "0")
    assert chosen(1024) is FLATTENED and not calls
    monkeypatch.setenv(SWITCH, "1")
    assert chosen(1024) is SPECIALISED
    monkeypatch.setenv(SWITCH, "on")
    with pytest.raises(ValueError, match=f"{SWITCH}.*expected 0 or 1.*'on'"):
        chosen(1024)


def test_a_process_tries_once(hopper):
    calls, _ = hopper
    for _ in range(3):
        assert chosen(1024) is SPECIALISED
    assert calls == [HOST]


def test_it_does_without_and_says_so_once(hopper):
    calls, reason = hopper
    reason[0] = "the compiler ignored it"
    with pytest.warns(RuntimeWarning, match="cpu, the compiler ignored it; the flattened"):
        assert chosen(1024) is FLATTENED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(1024) is FLATTENED
    assert calls == [HOST]


def test_a_capture_does_not_wait_for_a_trial(hopper, monkeypatch):
    calls, _ = hopper
    monkeypatch.setattr(anchored_variant, "capturing", lambda device: True)
    assert chosen(1024) is FLATTENED and not calls
    monkeypatch.setattr(anchored_variant, "capturing", lambda device: False)
    assert chosen(1024) is SPECIALISED
    monkeypatch.setattr(anchored_variant, "capturing", lambda device: True)
    assert chosen(1024) is SPECIALISED


def test_other_parts_have_one_variant(hopper, monkeypatch):
    monkeypatch.setattr(anchored_variant, "architecture", lambda device: "sm_100")
    assert chosen(1024) is LAUNCHES["anchored_logps"][16, "sm_100"]
    assert not hopper[0]
