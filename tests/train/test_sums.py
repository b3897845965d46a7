"""Questions in words: what is asked, what is held out, which replies are right."""

from __future__ import annotations

import re

import pytest

from fastgrpo.train.arithmetic import character_tokenizer
from fastgrpo.train.scoring import right, score
from fastgrpo.train.sums import differences_task, sums_task

MAKERS = {"+": sums_task, "-": differences_task}


@pytest.mark.parametrize("sign", MAKERS)
def test_held_out_questions_are_not_trained_on(sign: str) -> None:
    task = MAKERS[sign](character_tokenizer(), 0, 128)
    other = MAKERS[sign](character_tokenizer(), 1, 128)
    asked = {e.prompt for e in task.train}
    held_out = {e.prompt for e in task.held_out}
    assert len(held_out) == 128 and not asked & held_out
    assert len(asked) + 128 == {"+": 400, "-": 435}[sign]
    assert asked | held_out == {e.prompt for e in other.train + other.held_out}
    assert held_out != {e.prompt for e in other.held_out}
    for example in task.train:
        words = example.messages[0]["content"].split()
        a, b = int(words[2]), int(words[4].strip("?"))
        assert words[3] == sign and int(example.answer) == (a + b if sign == "+" else a - b) > 0


def terms(prompt: str) -> frozenset[str]:
    return frozenset(re.findall(r"\d+", prompt))


@pytest.mark.parametrize("eval_size", [1, 2, 127, 128, 398, 399])
def test_a_sum_is_not_trained_on_in_the_other_order(eval_size: int) -> None:
    for seed in range(5):
        task = sums_task(character_tokenizer(), seed, eval_size)
        assert len(task.held_out) == eval_size and len(task.train) == 400 - eval_size
        assert not {terms(e.prompt) for e in task.train} & {terms(e.prompt) for e in task.held_out}
        again = sums_task(character_tokenizer(), seed, eval_size)
        assert (again.train, again.held_out) == (task.train, task.held_out)


@pytest.mark.parametrize(
    ("reply", "is_right"),
    [
        ("{}", True),
        ("The answer is {}.", True),
        ("{a} = {}", True),
        ("{a} = {}.", True),
        ("1{}", False),
        ("{a}", False),
        ("{} or 3", False),
        ("", False),
    ],
)
def test_a_number_or_a_calculation_with_that_result_is_right(reply: str, is_right: bool) -> None:
    task = sums_task(character_tokenizer(), 0, 128)
    example = task.train[0]
    asked = example.messages[0]["content"].removeprefix("What is ").split("?")[0]
    one = (task, [example], [reply.format(example.answer, a=asked)])
    assert score(*one).rewards.tolist() == [float(is_right)] and right(*one) == [is_right]


def test_something_is_left_to_train_on() -> None:
    with pytest.raises(ValueError, match="eval_size: expected below 400, got 400"):
        sums_task(character_tokenizer(), 0, 400)
