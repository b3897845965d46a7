"""Rewards: TRL's signature, several with weights, those that fail, and their precision."""

from __future__ import annotations

import math

import pytest
import torch

from fastgrpo import group_advantages
from fastgrpo.train.rewards import Accuracy, Reward, one_by_one, text_of
from fastgrpo.train.scoring import centred, check_rewards, right, score
from fastgrpo.train.tasks import Example, Task

CHAT = Example("[user]hi", "5", {"level": 2}, ({"role": "user", "content": "hi"},))
PLAIN = Example("hi", "5", {"level": 2})


def task_of(*functions, weights=None, examples=(PLAIN,)) -> Task:
    weights = weights or [1.0] * len(functions)
    names = [f.__name__ for f in functions]
    return Task("a", [*examples], [], tuple(map(Reward, names, functions, weights)))


def rewards_of(function, completions: list[str], example: Example = PLAIN) -> list[float]:
    return score(task_of(function), [example] * len(completions), completions).rewards.tolist()


def test_a_function_gets_texts_or_messages_as_the_prompt_is() -> None:
    seen = []

    def spy(prompts, completions, answer, level, **rest):
        seen.append((prompts, completions, answer, level, rest))
        return [float(text_of(c)) for c in completions]

    assert rewards_of(spy, ["1", "2"]) == [1.0, 2.0]
    assert rewards_of(spy, ["3"], CHAT) == [3.0]
    assert seen == [
        (["hi", "hi"], ["1", "2"], ["5", "5"], [2, 2], {}),
        ([[{"role": "user", "content": "hi"}]], [[{"role": "assistant", "content": "3"}]],
         ["5"], [2], {}),
    ]  # fmt: skip


def test_a_function_of_trl_runs_as_it_is() -> None:
    """The form of TRL's own accuracy rewards: keywords, messages, further columns in kwargs."""

    def accuracy_reward(completions, answer, **kwargs):
        contents = [completion[0]["content"] for completion in completions]
        assert kwargs["level"] == [2, 2] and len(kwargs["prompts"]) == 2
        return [float(c == a) for c, a in zip(contents, answer, strict=True)]

    assert rewards_of(accuracy_reward, ["5", "6"], CHAT) == [1.0, 0.0]


def test_a_column_that_the_data_have_not_is_refused_before_a_step() -> None:
    def hard(completions, difficulty):
        return [0.0 for _ in completions]

    message = (
        r"reward hard: expected parameters among \['answer', 'completions', 'level', 'prompts'\]"
        r".* got \['difficulty'\]"
    )
    with pytest.raises(ValueError, match=message):
        check_rewards(task_of(hard))

    def has_default(completions, difficulty=None, *extra, **rest):
        return [0.0 for _ in completions]

    check_rewards(task_of(has_default))


def test_a_column_that_a_row_has_not_is_none_there() -> None:
    def level(completions, level):
        return level

    task = task_of(level)
    scores = score(task, [PLAIN, Example("a", "1")], ["", ""])
    assert scores.rewards[0] == 2 and scores.rewards[1].isnan()


def test_a_column_that_no_row_of_a_batch_has_is_none_in_all_of_it() -> None:
    def level(completions, level, answer):
        return [7.0 if (n, a) == (None, None) else 0.0 for n, a in zip(level, answer, strict=True)]

    bare = Example("a")
    task = task_of(level, examples=(PLAIN, bare))
    assert score(task, [bare, bare], ["", ""]).rewards.tolist() == [7.0, 7.0]


def test_the_sum_is_weighted_and_leaves_out_what_does_not_apply() -> None:
    def a(completions):
        return [1.0, 2.0, None, None]

    def b(completions):
        return [10.0, None, 30.0, None]

    scores = score(task_of(a, b, weights=[2.0, 0.5]), [PLAIN] * 4, [""] * 4)
    assert scores.rewards[:3].tolist() == [7.0, 4.0, 15.0] and scores.rewards[3].isnan()
    assert scores.rewards.dtype == torch.float64
    metrics = scores.metrics()
    assert metrics["reward"] == pytest.approx(26 / 3) and metrics["unscorable"] == 1
    assert metrics["reward_std"] == pytest.approx(torch.tensor([7.0, 4.0, 15.0]).std().item())
    assert metrics["rewards/a/mean"] == 1.5 and metrics["rewards/b/mean"] == 20.0
    assert metrics["rewards/b/std"] == pytest.approx(math.sqrt(200))
    picked = scores[torch.tensor([0, 2])]
    assert picked.metrics()["rewards/b/mean"] == 20.0 and picked.rewards.tolist() == [7.0, 15.0]


def test_unscorable_completions_do_not_reach_the_group() -> None:
    def judge(completion: str, answer: str) -> float | None:
        return {
            "raise": lambda: 1 / 0,
            "none": lambda: None,
            "inf": lambda: math.inf,
        }.get(completion, lambda: float(completion))()

    completions = ["1", "raise", "0", "none", "nan", "inf", "junk", "1"]
    with pytest.warns(UserWarning, match=r"ZeroDivisionError.* for 2 of 8 .*unscorable"):
        rewards = torch.tensor(rewards_of(one_by_one(judge), completions))
    assert rewards.isnan().tolist() == [False, True, False, True, True, True, True, False]
    advantages = group_advantages(centred(rewards.double(), 4), 4)
    assert torch.equal(advantages[:4].sign(), torch.tensor([1.0, 0.0, -1.0, 0.0]))
    assert not advantages[4:].any()  # one scored completion alone has nothing to be compared with


def test_rewards_that_are_too_large_are_named() -> None:
    """Those that are taken can be compared with each other in any group."""

    def number(completions):
        return [float(c) for c in completions]

    taken = [*["-1e14"] * 7, "1e14"]
    advantages = group_advantages(centred(score(task_of(number), [PLAIN] * 8, taken).rewards, 8), 8)
    assert advantages[7] > 2
    with pytest.warns(UserWarning, match=r"reward number: .* at most 1e\+14 .* got -inf; 2 of 3"):
        assert torch.tensor(rewards_of(number, ["-inf", "1", "2e14"])).isnan().tolist() == [1, 0, 1]
    weighted = task_of(number, weights=[1e3])
    with pytest.warns(UserWarning, match=r"weighted sum of rewards: .* got 1e\+15; 1 of 2"):
        assert score(weighted, [PLAIN] * 2, ["1e12", "1"]).rewards.isnan().tolist() == [1, 0]


def test_a_reward_that_raises_is_not_left_out_of_the_sum() -> None:
    """Else what it would have taken away were a gift."""

    def penalty(completions):
        return [-1.0 / len(c) for c in completions]

    def bonus(completions):
        return [1.0 for _ in completions]

    with pytest.warns(UserWarning, match="reward penalty raised"):
        scores = score(task_of(penalty, bonus), [PLAIN] * 2, ["", "a"])
    assert scores.rewards.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "reward f: expected 2 numbers, got 1"),
        (None, "reward f: expected a list of numbers or None, got None"),
        (0.5, "reward f: expected a list of numbers or None, got 0.5"),
        ([[1.0], [2.0]], "reward f: expected a list of numbers or None, got"),
        ("11", "reward f: expected a list of numbers or None, got '11'"),
        ({"a": 1.0, "b": 2.0}, "reward f: expected a list of numbers or None, got {'a'"),
        ({1.0, 2.0}, "reward f: expected a list of numbers or None, got {1.0"),
    ],
)
def test_anything_but_a_number_each_ends_the_run(result: object, message: str) -> None:
    def f(completions):
        return result

    with pytest.raises(ValueError, match=message):
        rewards_of(f, ["a", "b"])


def test_tensors_and_truths_are_numbers() -> None:
    assert rewards_of(lambda completions: torch.tensor([1.0, 2.0]), ["", ""]) == [1.0, 2.0]
    assert rewards_of(lambda completions: [True, False], ["", ""]) == [1.0, 0.0]


def test_accuracy_is_a_threshold() -> None:
    def length(completions):
        return [None if c == "none" else math.nan if c == "nan" else len(c) for c in completions]

    task = Task("a", [], [], (), Accuracy(length, 2.0))
    assert right(task, [PLAIN] * 5, ["a", "ab", "abc", "none", "nan"]) == [
        False, True, True, False, False
    ]  # fmt: skip


def test_rewards_keep_their_differences_until_they_are_advantages() -> None:
    """In fp32, one billion and one billion and one are the same number."""
    exact = [1e9, 1e9 + 1, 1e9 + 2, 1e9 + 1]
    rewards = torch.tensor([*exact, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    advantages = group_advantages(centred(rewards, 4), 4)
    small = group_advantages(torch.tensor([0.0, 1.0, 2.0, 1.0]), 4)
    torch.testing.assert_close(advantages[:4], small)
    assert not advantages[4:].any()


def test_rounding_of_a_sum_is_no_difference() -> None:
    total = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3], dtype=torch.float64)
    assert total[0] != total[1]
    assert not centred(total, 4).any()
