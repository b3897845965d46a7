"""Rewards of files: what hangs, dies, prints or returns strange things costs one completion."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fastgrpo.train import reward_process, scoring
from fastgrpo.train.reward_process import (
    RewardEnded,
    RewardError,
    RewardLost,
    RewardTimeout,
    in_own_process,
)
from fastgrpo.train.rewards import Accuracy, Reward, WrongResult, load_rewards
from fastgrpo.train.scoring import right, score
from fastgrpo.train.tasks import Example, Task

FILE = """
import multiprocessing, os, subprocess, sys, time
import numpy as np

calls = []

def faulty(completions):
    calls.append(completions)
    for text in completions:
        if text == "hangs":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            time.sleep(600)
        if text == "spins":
            while True:
                pass
        if text == "dies":
            os.kill(os.getpid(), 9)
        if text == "raises":
            raise KeyError("no")
        if text == "prints":
            print("out"), print("err", file=sys.stderr)
        if text == "forks" and not os.fork():
            os._exit(0)
    strange = {"none": None, "nan": float("nan"), "numpy": np.float32(2)}
    return [strange.get(text, 1) for text in completions]

def process(completions):
    return [os.getpid()]

def number(completions):
    return 3.0

def lists(completions):
    return [[1.0] for _ in completions]

def digits(completions):
    return "1" * len(completions)

def mapping(completions):
    return {i: 0.5 for i in range(len(completions))}

def length(text):
    return float(len(text))

def pooled(completions):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(length, completions)

def comes_back(completions):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return [1.0 if child else 9.0] * len(completions)

def tensor(completions):
    import torch
    return torch.ones(len(completions))
"""


@pytest.fixture
def file(tmp_path) -> str:
    (tmp_path / "own.py").write_text(FILE)
    return str(tmp_path / "own.py")


def rewards(file: str, name: str, limit: float = 20.0) -> Reward:
    (reward,) = load_rewards([f"{file}:{name}"], None)
    return in_own_process(reward, limit)


def scores(reward: Reward, completions: list[str]) -> list[float]:
    examples = [Example("")] * len(completions)
    return score(Task("t", examples, [], (reward,)), examples, completions).rewards.tolist()


def alive(group: int) -> list[str]:
    """The processes of a group that have not ended; those that nobody has waited for have."""
    lines = subprocess.check_output(["ps", "-eo", "pgid,stat"], text=True).splitlines()[1:]
    return [line for line in lines if int(line.split()[0]) == group and "Z" not in line]


def until_ended(group: int) -> None:
    """Wait until a group has no process."""
    deadline = time.monotonic() + 10
    while alive(group):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_fault_costs_one_completion(file) -> None:
    reward = rewards(file, "faulty")
    with pytest.warns(UserWarning, match=r"faulty raised RewardError\(.KeyError.* for 1 of 3"):
        found = scores(reward, ["right", "raises", "right"])
    assert found == pytest.approx([1, float("nan"), 1], nan_ok=True)
    with pytest.warns(UserWarning, match="its process has ended.* for 1 of 3"):
        found = scores(reward, ["right", "dies", "right"])
    assert found == pytest.approx([1, float("nan"), 1], nan_ok=True)
    found = scores(reward, ["prints", "forks", "none", "nan", "numpy"])
    assert found == pytest.approx([1, 1, float("nan"), float("nan"), 2], nan_ok=True)


def test_what_hangs_is_killed_with_its_children(file) -> None:
    reward = rewards(file, "faulty", limit=20.0)
    assert scores(reward, ["right"]) == [1]
    group = reward.function.pid
    assert alive(group)
    reward.function.limit = 1.0
    with pytest.raises(RewardTimeout, match="no result after 1 seconds"):
        reward.function(completions=["hangs"])
    until_ended(group)
    reward.function.limit = 20.0
    assert scores(reward, ["right"]) == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to do it")
def test_a_call_that_hangs_ends_with_a_training_that_is_killed(file) -> None:
    training = f"""
from fastgrpo.train.reward_process import in_own_process
from fastgrpo.train.rewards import load_rewards
(reward,) = load_rewards([{file!r} + ":faulty"], None)
function = in_own_process(reward, 600.0).function
function(completions=["right"])
print(function.pid, flush=True)
function(completions=["spins"])
"""
    with subprocess.Popen([sys.executable, "-c", training], stdout=subprocess.PIPE) as process:
        group = int(process.stdout.readline())
        assert alive(group)
        process.kill()
    until_ended(group)


def test_the_start_of_the_process_is_not_the_time_of_a_call(file) -> None:
    """Python and this package need longer."""
    assert scores(rewards(file, "faulty", limit=0.5), ["right"]) == [1]


def test_a_reward_that_always_hangs_is_not_waited_for_again_and_again(monkeypatch) -> None:
    calls = []

    def hangs(completions: list[str]) -> list[float]:
        calls.append(completions)
        raise RewardTimeout("no result")

    with pytest.warns(UserWarning, match="for 9 of 9 completions"):
        found = scores(Reward("hangs", hangs), ["text"] * 9)
    assert len(found) == 9 and len(calls) == 1 + scoring.PATIENCE


def test_a_process_keeps_its_module_and_ends_with_its_reward(file) -> None:
    reward = rewards(file, "process")
    first, second = (reward.function(completions=["a"]) for _ in range(2))
    assert first == second != [os.getpid()]
    assert reward.function.pid == first[0]
    del reward
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first[0]), 0)


def test_what_is_no_list_of_numbers_ends_the_run(file) -> None:
    with pytest.raises(WrongResult, match="number: expected a list of numbers or None, got 3.0"):
        scores(rewards(file, "number"), ["a"])
    with pytest.raises(WrongResult, match="lists: expected a list of numbers or None, got"):
        scores(rewards(file, "lists"), ["a"])
    for name, given in (("digits", "'11'"), ("mapping", "{0: 0.5, 1: 0.5}")):
        with pytest.raises(WrongResult, match=f"{name}: expected a list of .*, got {given}"):
            scores(rewards(file, name), ["a", "b"])
    assert scores(rewards(file, "tensor"), ["a", "b"]) == [1, 1]


def test_a_reward_may_have_a_pool_of_processes(file) -> None:
    """They find its functions under the name of its module, which pickle cuts at dots."""
    assert scores(rewards(file, "pooled"), ["a", "abc"]) == [1, 3]


def test_a_fork_that_comes_back_gives_no_answer(file) -> None:
    reward = rewards(file, "comes_back")
    assert [scores(reward, ["a", "b"]) for _ in range(3)] == [[1, 1]] * 3


def test_a_file_that_is_gone_is_an_error_of_the_reward(file) -> None:
    reward = rewards(file, "faulty")
    Path(file).unlink()
    with pytest.raises(RewardError, match="its process has ended"):
        reward.function(completions=["a"])


class Broken:
    """A reward process that ends with every call but some."""

    def __init__(self, answers: set[int]) -> None:
        self.calls, self.answers = 0, answers

    def __call__(self, completions: list[str]) -> list[float]:
        self.calls += 1
        if self.calls in self.answers:
            return [1.0]
        raise RewardEnded("its process has ended")


@pytest.mark.parametrize(
    ("answers", "calls"), [(set(), 4), ({3, 6, 8}, 10)], ids=["always", "for some completions"]
)
def test_a_process_that_ends_is_not_started_for_each_completion(answers, calls) -> None:
    """But for as many as there are where completions are what ends it."""
    broken = Broken(answers)
    with pytest.warns(UserWarning, match=f"for {9 - len(answers)} of 9 completions"):
        scores(Reward("broken", broken), ["text"] * 9)
    assert broken.calls == calls


def test_a_reward_that_never_answers_ends_the_run(file, monkeypatch) -> None:
    """An answer in between begins the count anew; an exception is one."""
    reward = rewards(file, "faulty")
    monkeypatch.setattr(reward_process, "CALLS", 2)
    for text in ("dies", "raises", "dies", "dies"):
        with suppress(RewardError):
            reward.function(completions=[text])
    for ask in (score, right):
        task = Task("t", [Example("")], [], (reward,), Accuracy(reward.function))
        with pytest.raises(RewardLost, match="reward faulty: no answer to 2 calls in a row"):
            ask(task, task.train, ["right"])
