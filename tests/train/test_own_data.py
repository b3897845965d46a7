"""Prompts of one's own: texts and conversations, columns, and rows that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastgrpo.train.arithmetic import character_tokenizer
from fastgrpo.train.catalogue import load_task
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.own_data import read_examples
from fastgrpo.train.rewards import Reward
from fastgrpo.train.scoring import right, score
from fastgrpo.train.tasks import Example, Task, TemplatedPrompt

USER = {"role": "user", "content": "2+2"}
SYSTEM = {"role": "system", "content": "short"}
REPLY = {"role": "assistant", "content": "4"}


@pytest.fixture
def tokenizer():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    return tokenizer


def written(folder: Path, *rows: object) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "2+2="}, Example("2+2=")),
        ({"prompt": "2+2=", "answer": "4", "level": [1]}, Example("2+2=", "4", {"level": [1]})),
        ({"prompt": [USER], "answer": "4"}, Example("[user]2+2[assistant]", "4", {}, (USER,))),
        (
            {"messages": [SYSTEM, USER, REPLY]},
            Example("[system]short[user]2+2[assistant]", "4", {}, (SYSTEM, USER)),
        ),
        (
            {"messages": [USER, REPLY, USER], "answer": None},
            Example("[user]2+2[assistant]4[user]2+2[assistant]", None, {}, (USER, REPLY, USER)),
        ),
    ],
)
def test_rows(tmp_path, tokenizer, row: dict, example: Example) -> None:
    (read,) = read_examples(written(tmp_path, row), tokenizer)
    assert read == example
    assert isinstance(read.prompt, TemplatedPrompt) == (example.messages is not None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "2+2"}, r"either 'prompt' or 'messages', got the fields \['question'\]"),
        ({"prompt": "a", "messages": [USER]}, "either 'prompt' or 'messages'"),
        ({"prompt": 3}, "a text or a list of messages, got 3"),
        ({"prompt": []}, "a text or a list of messages"),
        ({"prompt": ["hi"]}, "expected a role"),
        ({"prompt": [{"role": "human", "content": "hi"}]}, "expected a role"),
        ({"prompt": [{"role": "user"}]}, "expected a text as 'content', got None"),
        ({"prompt": "a", "answer": 4}, "expected a text as 'answer', got 4"),
        ({"messages": [USER, REPLY], "answer": "4"}, "expected one answer"),
        ({"messages": [REPLY]}, "expected a message before the assistant's"),
        ({"prompt": "a", "completions": "b"}, "expected no fields 'prompts' or 'completions'"),
        ([], "expected a JSON object"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, tokenizer, row, message: str) -> None:
    path = written(tmp_path, {"prompt": "fine"}, row)
    with pytest.raises(ValueError, match=f"data.jsonl, line 2: .*{message}"):
        read_examples(path, tokenizer)


def test_without_a_template_a_question_is_joined_and_a_dialogue_refused(tmp_path) -> None:
    tokenizer = character_tokenizer()
    (read,) = read_examples(written(tmp_path, {"prompt": [SYSTEM, USER]}), tokenizer)
    assert read.prompt == "short\n\n2+2\n"
    with pytest.raises(ValueError, match="line 1: expected a tokenizer with a chat template"):
        read_examples(written(tmp_path, {"prompt": [USER, REPLY, USER]}), tokenizer)


def test_a_file_that_is_not_there_is_named(tokenizer) -> None:
    with pytest.raises(ValueError, match="data: expected a file .*no.jsonl"):
        read_examples("no.jsonl", tokenizer)


@pytest.fixture
def settings(tmp_path) -> dict:
    (tmp_path / "mine.py").write_text(
        "def same(completions, answer):\n"
        "    return [float(c == a) for c, a in zip(completions, answer)]\n"
        "def length(completions, limit):\n"
        "    return [float(len(c) <= n) for c, n in zip(completions, limit)]\n"
    )
    data = written(tmp_path, *({"prompt": f"{i}=", "answer": str(i), "limit": 1} for i in range(9)))
    functions = [f"{tmp_path}/mine.py:{name}" for name in ("same", "length")]
    return {"task": "jsonl", "data": data, "model": "m", "reward": functions}


def test_files_and_functions_make_a_task(settings, tokenizer) -> None:
    task = load_task(TrainConfig(**settings, reward_weight=[1.0, 0.5]), tokenizer)
    assert len(task.train) == 8 and len(task.held_out) == 1 and task.accuracy is None
    scores = score(task, task.train[:2], ["0", "11"])
    assert scores.rewards.tolist() == [1.5, 0.0]
    assert list(scores.by_reward) == ["same", "length"]
    judged = load_task(TrainConfig(**settings, accuracy="length=1"), tokenizer)
    assert right(judged, task.train[:2], ["7", "11"]) == [True, False]


def test_rewards_of_ones_own_replace_those_of_a_task(settings, tokenizer) -> None:
    config = TrainConfig(reward=settings["reward"][:1])
    (reward,) = load_task(config, tokenizer).rewards
    assert reward.name == "same"
    with pytest.raises(ValueError, match="reward length: .* got .'limit'. without a default"):
        load_task(TrainConfig(reward=settings["reward"]), tokenizer)


def test_accuracy_may_be_by_any_reward_of_the_task(settings, tokenizer, tmp_path) -> None:
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": "a", "answer": f"#### {i}"} for i in range(4)]
    flags = {"task": "gsm8k", "data": written(tmp_path / "gsm8k", *rows), "model": "m"}
    formal = load_task(TrainConfig(**flags, accuracy="format=0.4"), tokenizer)
    assert right(formal, formal.train[:2], ["<answer></answer>", "<answer>"]) == [True, False]
    for config, known in (
        (TrainConfig(**flags, accuracy="same=1"), "correctness', 'format"),
        (TrainConfig(accuracy="format=1"), "correct"),
        (TrainConfig(**settings, accuracy="correct=1"), "same', 'length"),
    ):
        with pytest.raises(ValueError, match=f"accuracy: .* the rewards .'{known}'., got "):
            load_task(config, tokenizer)


def test_flags_replace_the_rewards_of_a_task_made_in_python(settings, tokenizer) -> None:
    made = Task("copying", [Example("2=", "2")], [], (Reward("none", lambda completions: [0.0]),))
    config = TrainConfig(reward=settings["reward"][:1], accuracy="same=1")
    task = load_task(config, tokenizer, made)
    assert [reward.name for reward in task.rewards] == ["same"] and task.name == "copying"
    assert right(task, task.train, ["2"]) == [True] and task.train == made.train
