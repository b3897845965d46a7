"""docs/training.md: its flags exist, and its data, rewards and commands work."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fastgrpo.train.arithmetic import character_tokenizer
from fastgrpo.train.catalogue import load_task
from fastgrpo.train.config import TrainConfig, parse_flags
from fastgrpo.train.scoring import right, score

ROOT = Path(__file__).parents[2]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8") for name in ("docs/training.md", "README.md")
}
PAGE = PAGES["docs/training.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = dict(FENCED.findall(PAGE))
COMMANDS = [
    command.replace("\\\n", " ")
    for page in PAGES.values()
    for language, block in FENCED.findall(page)
    for command in re.findall(r"^python examples/grpo_train.py((?:.*\\\n)*[^#\n]*)", block, re.M)
    if not language
]


def test_every_flag_on_the_page_exists() -> None:
    known = {field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)}
    of_the_script = re.sub(
        r"(python -m|torchrun) [^`\n]*", "", PAGE
    )  # others have flags of their own
    named = set(re.findall(r"--([a-z][a-z-]+)", of_the_script)) - {"help"}
    assert named <= known and {"reward", "lora-rank", "loss-option", "preset"} <= named


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    functions = BLOCKS["python"] + "\nright = says_it\n"
    (tmp_path / "my_rewards.py").write_text(functions)
    settings = dataclasses.asdict(TrainConfig())
    (tmp_path / "runs" / "FOLDER").mkdir(parents=True)
    (tmp_path / "runs" / "FOLDER" / "settings.json").write_text(json.dumps(settings))
    parse_flags(command.split())


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) >= 6


def test_the_task_of_the_page(tmp_path) -> None:
    (tmp_path / "prompts.jsonl").write_text(BLOCKS["json"] * 3)
    (tmp_path / "my_rewards.py").write_text(BLOCKS["python"])
    config = TrainConfig(
        task="jsonl", data=str(tmp_path / "prompts.jsonl"), model="MODEL",
        reward=[f"{tmp_path}/my_rewards.py:says_it"], accuracy="says_it=1",
    )  # fmt: skip
    task = load_task(config, character_tokenizer())
    one = (task, task.train[:1])
    assert score(*one, ["It is 23."]).rewards.item() == 1.0
    assert right(*one, ["It is 23."]) == [True] and right(*one, ["21"]) == [False]
