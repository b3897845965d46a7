"""A GPU's session, rehearsed where there is none: order, faults, and the end within its budget."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks import gpu_checks, record
from benchmarks.child import Ended, run_command
from benchmarks.environment import ROOT
from benchmarks.gpu_measurements import FULL, SETTINGS, cuda_stages
from benchmarks.measure import MODES
from benchmarks.providers import load
from benchmarks.shapes import LARGE_SHAPE
from benchmarks.stages import NO_TIME, SECTIONS, Record
from fastgrpo_kernels.surrogates import SURROGATES

# Unlike time.sleep, PyDLL keeps the interpreter's lock: no other Python thread can run.
HANG = "__import__('ctypes').PyDLL(None).sleep(60)"
CHECKS = [
    "doctor, doctor",
    "tests, without the grid",
    "sanitizer, memcheck",
    "sanitizer, racecheck",
    "tests, grid",
]


def test_the_stages_of_a_gpu_cover_every_head_and_mode():
    available, _ = load(("plain logits", "fastgrpo torch"))
    stages = cuda_stages(available, FULL)
    labels = [stage.label for stage in stages]
    assert len(stages) == len({stage.name for stage in stages})
    for head in ("qwen3-0.6b", "qwen2.5-7b", "llama-3-8b", "gemma-3-4b"):
        for rows in (4096, 16384, 65536):
            assert any(label.startswith(f"{head} N={rows} ") for label in labels)
    for mode in MODES:
        assert any(label.endswith(f" {mode}") for label in labels)
    assert {stage.section for stage in stages} == {"accuracy", "sweep", "speed"}
    assert any(label == f"{LARGE_SHAPE.label} loss" for label in labels)


# ---- children ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hangs", [True, False])
def test_a_child_ends_with_all_that_it_has_started(tmp_path, hangs):
    """After its time if it hangs, and without its rest if it does not."""
    program = textwrap.dedent(f"""
        import subprocess, sys, time
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        rest = subprocess.Popen(command, start_new_session=True)
        print(rest.pid, flush=True)
        time.sleep({60 if hangs else 0})
        sys.exit(3)
    """)
    log = tmp_path / "child.log"
    code, seconds = run_command([sys.executable, "-c", program], 3 if hangs else 60, log)
    assert code == (None if hangs else 3) and seconds < 10
    rest = int(log.read_text())
    deadline = time.monotonic() + 10
    while is_running(rest) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(rest)


def is_running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and ") Z " not in status.read_text()


ALONE = """\
tests/gpu/test_a.py::test_first PASSED                                   [  9%]
tests/gpu/test_a.py::test_ids[one chunk] FAILED                          [ 18%]
tests/gpu/test_a.py::test_ids[a ERROR b] PASSED                          [ 27%]
tests/gpu/test_a.py::test_error ERROR                                    [ 36%]
tests/gpu/test_a.py::test_skip SKIPPED (no entry for this part)          [ 45%]
tests/gpu/test_a.py::test_cut_off """
SHARED = """\
created: 2/2 workers
tests/gpu/test_a.py::test_first 
[gw0] [  9%] PASSED tests/gpu/test_a.py::test_first 
tests/gpu/test_a.py::test_ids[one chunk] 
[gw1] [ 18%] FAILED tests/gpu/test_a.py::test_ids[one chunk] 
[gw1] [ 27%] PASSED tests/gpu/test_a.py::test_ids[a ERROR b] 
[gw0] [ 36%] ERROR tests/gpu/test_a.py::test_error 
[gw1] [ 45%] SKIPPED tests/gpu/test_a.py::test_skip 
tests/gpu/test_a.py::test_cut_off """  # noqa: W291  as it is printed
SUMMARY = """
E   AssertionError: no FAILED  or PASSED  here
SKIPPED [1] tests/gpu/test_a.py:9: no entry for this part
ERROR tests/gpu/test_a.py::test_error - RuntimeError
FAILED tests/gpu/test_a.py::test_ids[one chunk] - AssertionError: a PASSED test
"""


@pytest.mark.parametrize("printed", [ALONE, SHARED], ids=["one process", "several"])
def test_verdicts_are_counted_in_both_forms(printed):
    expected = {"PASSED": 2, "FAILED": 1, "ERROR": 1, "SKIPPED": 1}
    assert gpu_checks.verdicts(printed) == gpu_checks.verdicts(printed + SUMMARY) == expected


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Return a function that puts these tests in the place of tests/gpu, with its conftest."""

    def put(module):
        folder = tmp_path / "tests"
        folder.mkdir()
        (folder / "pytest.ini").write_text("[pytest]\nmarkers = grid\n")
        (folder / "conftest.py").write_text((ROOT / "tests/gpu/conftest.py").read_text())
        # Not test_*.py, which the conftest leaves out where there is no GPU.
        path = folder / "gpu_module.py"
        path.write_text(textwrap.dedent(module))
        monkeypatch.setattr(gpu_checks, "TESTS", str(path))

    return put


def test_gpu_tests_that_are_cut_off_leave_what_they_have_shown(tmp_path, stand_ins):
    stand_ins("""
        import time
        def test_first(): pass
        def test_second(): assert False
        def test_third(): time.sleep(60)
    """)
    log = tmp_path / "record.tests.log"
    row = gpu_checks.gpu_tests("not grid", log, timeout=8)
    assert row["counts"] == {"PASSED": 1, "FAILED": 1, "ERROR": 0, "SKIPPED": 0}
    assert "FAILED" in log.read_text() and row["tail"]
    assert row["exit_code"] is None and row["failure"] == "did not finish in 8 s"


def test_a_few_of_the_grid_run_before_it(tmp_path):
    """Of tests/gpu, as they are collected where torch says that there is a GPU."""
    (tmp_path / "gpu.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "gpu", "tests/gpu", "--collect-only", "-q"]
        + ["-m", "not grid", "--strict-markers"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert collected.returncode == 0, collected.stdout
    for name, most in (("surrogate", 2 * len(SURROGATES) / 4), ("kl", 4)):
        assert 1 <= collected.stdout.count(f"::test_every_{name}_is_its_twin") <= most
    assert collected.stdout.count("::test_losses") > 50


def test_the_sanitizer_is_skipped_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_checks, "SANITIZER_FOLDER", str(tmp_path / "cuda"))
    made = Record(tmp_path / "r.json", budget=100)
    (stage,) = (s for s in gpu_checks.check_stages(made, 100) if s.label == "memcheck")
    for waiting in made.waiting([stage]):
        made.run(waiting)
    assert "no compute-sanitizer on PATH" in made.content["skipped"]["sanitizer, memcheck"]


@pytest.mark.parametrize("taken, limits", [(1, [60, 70, 20, 20, 30]), (0, [60, 100, 57, 80, 200])])
def test_checks_share_their_time(tmp_path, monkeypatch, taken, limits):
    """One that is short leaves its time to the others; together they end in time."""
    now, given = [0.0], []

    def run(command, timeout, log, **variables):
        log.write_text("")
        given.append(timeout)
        now[0] += taken * timeout
        return Ended(0, taken * timeout)

    monkeypatch.setattr(gpu_checks, "run_command", run)
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda *_, **__: "/bin/compute-sanitizer")
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for stage in gpu_checks.check_stages(Record(tmp_path / "r.json", budget=300), seconds=200):
        stage.work()
    assert given == pytest.approx(limits, abs=1) and now[0] == pytest.approx(200 * taken)


# ---- the session -------------------------------------------------------------------------------

WORKER = f"""
import os, sys, time
from pathlib import Path

from benchmarks import gpu_measurements
from benchmarks.stages import Record, Stage


def begins():
    return [{{"provider": os.getpid()}}]


def raises():
    raise RuntimeError("wrong")


def aborts():
    os.abort()


def hangs():
    {HANG}


def loses_the_device():
    gpu_measurements.synced_clock = raises
    return begins()


def ends():
    return begins()


stages = begins, raises, aborts, hangs, loses_the_device, ends
stages = [Stage("speed", stage.__name__, 1, stage) for stage in stages]
path, setting, until = sys.argv[1:]
made = Record(Path(path), float(until) - time.monotonic())
gpu_measurements.work_through(made, stages, seconds_a_stage=float(setting))
"""


def worker(folder, program=WORKER):
    (folder / "worker.py").write_text(program)
    return [sys.executable, str(folder / "worker.py")]


def names(section, *labels):
    return [f"{section}, {label}" for label in labels]


def test_measurements_go_on_in_a_new_process(tmp_path):
    """After a stage that raises, aborts, hangs, or after which the device takes no more calls."""
    made = Record(tmp_path / "r.json", budget=100)
    record.measure_in_processes(made, [*worker(tmp_path), str(made.path), "2"])
    content = json.loads(made.path.read_text())
    assert content["skipped"] == {
        "speed, raises": "RuntimeError: wrong",
        "speed, aborts": "its process ended with exit code -6",
        "speed, hangs": "its process ended with exit code 1",
    }
    stages = ("begins", "raises", "aborts", "hangs", "loses_the_device", "ends")
    assert list(content["stages"]) == names("speed", *stages)
    assert 1.5 < content["stages"]["speed, hangs"] < 10
    assert len({row["provider"] for row in content["speed"]}) == len(content["speed"]) == 3
    assert content["running"] is None


def test_measurements_that_cannot_begin_are_named(tmp_path):
    made = Record(tmp_path / "r.json", budget=100)
    record.measure_in_processes(made, worker(tmp_path, "raise SystemExit(7)"))
    content = json.loads(made.path.read_text())
    assert content["skipped"] == {"measurements": "its process ended with exit code 7"}


def test_measurements_that_do_not_end_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "SECONDS_TO_START", 1)
    monkeypatch.setattr(record, "SECONDS_TO_END", 2)
    made = Record(tmp_path / "r.json", budget=4)
    record.measure_in_processes(made, worker(tmp_path, "import time; time.sleep(60)"))
    assert 0 < made.remaining() < 1.5


def test_a_session_that_hangs_ends_with_its_budget(tmp_path):
    program = f"""
from pathlib import Path
from benchmarks import record
from benchmarks.stages import Record, Stage

works = {{"begins": lambda: [{{}}], "hangs": lambda: {HANG}, "ends": lambda: [{{}}]}}
record.check_stages = lambda *_: [Stage("doctor", label, 1, work) for label, work in works.items()]
record.gpu_session(Record(Path({str(tmp_path / "r.json")!r}), 3), None, "rehearsal", [])
"""
    code, seconds = run_command(worker(tmp_path, program), 60, tmp_path / "log")
    content = json.loads((tmp_path / "r.json").read_text())
    assert code == 1 and seconds < 30
    assert content["running"] == "doctor, hangs" and content["doctor"] == [{}]
    assert content["skipped"] == {"doctor, hangs": NO_TIME, "doctor, ends": NO_TIME}
    assert "Timeout" in (tmp_path / "log").read_text()


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """Return a function that puts a compute-sanitizer with this body on PATH."""

    def put(body):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "compute-sanitizer").write_text(f"#!/bin/sh\n{body}\n")
        (folder / "compute-sanitizer").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return put


@pytest.mark.slow
def test_a_session_in_which_all_hangs_ends_with_its_budget(
    tmp_path, stand_ins, sanitizer, monkeypatch
):
    """As on a cold compile cache, only worse."""
    stand_ins(f"""
        import pytest
        def test_it(): {HANG}
        @pytest.mark.grid
        def test_of_the_grid(): {HANG}
    """)
    sanitizer("sleep 60")
    monkeypatch.setattr(gpu_checks, "DOCTOR", ["sleep", "60"])
    monkeypatch.setattr(gpu_checks, "NEEDS", 0)
    monkeypatch.setattr(record, "SECONDS_TO_START", 2)
    monkeypatch.setattr(record, "SECONDS_TO_END", 1)
    begun = time.monotonic()
    made = Record(tmp_path / "r.json", budget=60)
    record.gpu_session(made, None, "100", worker(tmp_path))
    assert time.monotonic() - begun < 60
    content = json.loads(made.path.read_text())
    rows = [*content["doctor"], *content["tests"], *content["sanitizer"]]
    assert [row["exit_code"] for row in rows] == [None] * len(CHECKS)
    assert content["running"] == "speed, hangs" and len(content["speed"]) == 1
    assert content["skipped"]["speed, hangs"] == content["skipped"]["speed, ends"] == NO_TIME


def test_the_rehearsal(tmp_path, stand_ins, sanitizer, monkeypatch, capfd):
    """A session of two calls, in Triton's interpreter: all stages, and a failure stops none."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FASTGRPO_BACKEND", "torch")  # which the GPU tests must not take
    monkeypatch.setattr(gpu_checks, "DOCTOR", [sys.executable, "-c", "raise SystemExit('ill')"])
    stand_ins("""
        import os, pytest
        def test_right(): assert os.environ["FASTGRPO_BACKEND"] == "triton"
        def test_wrong(): assert False
        @pytest.mark.grid
        def test_of_the_grid(): pass
    """)
    # The real one takes the options and the program just like this.
    sanitizer('test "$2" = racecheck && exit "$4"; shift 4; "$@"; echo "ERROR SUMMARY: 0 errors"')
    path = tmp_path / "r.json"
    record.main(["--rehearse", "--stages", "checks", "--output", str(path)])
    assert list(json.loads(path.read_text())["stages"]) == CHECKS
    record.main(["--rehearse", "--stages", "measurements", "--output", str(path)])
    content = json.loads(path.read_text())
    assert content["skipped"] == {} and content["running"] is None

    (doctor,) = content["doctor"]
    assert doctor["exit_code"] == 1 and doctor["tail"] == ["ill"]
    tests = {row["name"]: (row["exit_code"], row["counts"]) for row in content["tests"]}
    none = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    assert tests == {
        "without the grid": (1, none | {"PASSED": 1, "FAILED": 1}),
        "grid": (0, none | {"PASSED": 1}),
    }
    memcheck, racecheck = content["sanitizer"]
    assert memcheck["exit_code"] == 0 and memcheck["tail"][-1] == "ERROR SUMMARY: 0 errors"
    assert sum("loss" in line for line in memcheck["tail"]) == 2
    assert racecheck["exit_code"] == gpu_checks.SANITIZER_FOUND_ERRORS

    available, _ = load(("fastgrpo torch",))
    measured = cuda_stages(available, SETTINGS["rehearsal"])
    assert list(content["stages"]) == [*CHECKS, *(stage.name for stage in measured)]
    for section in ("accuracy", "speed"):
        ours = [row for row in content[section] if row["provider"] == "fastgrpo triton"]
        assert {row["mode"] for row in ours} == set(MODES)
    kernels = {row["kernel"] for row in content["sweep"]}
    assert kernels == {"linear_logps", "anchored_logps"}
    rows = [row for section in SECTIONS[3:] for row in content[section]]
    assert not [row for row in rows if "failure" in row]
    assert "| goal on an H200 |" in capfd.readouterr().out
