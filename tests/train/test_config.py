"""Flags: their defaults, and the settings that are refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import json

import pytest

import fastgrpo
from fastgrpo import LossConfig
from fastgrpo.objective.presets import PRESETS as LOSSES
from fastgrpo.train.config import TrainConfig, parse_flags
from fastgrpo.train.defaults import DEFAULTS, TASK_DEFAULTS
from fastgrpo.train.loss_flags import FIELDS, loss_options
from fastgrpo.train.rewards import load_rewards

JSONL = {"task": "jsonl", "data": "x", "model": "y"}


@pytest.fixture
def rewards(tmp_path) -> str:
    """A file with two reward functions."""
    path = tmp_path / "rewards.py"
    path.write_text(
        "def short(completions):\n    return [-len(c) for c in completions]\n"
        "def same(completions, answer):\n"
        "    return [float(c == a) for c, a in zip(completions, answer)]\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "poetry"}, "task: expected one of"),
        ({"loss": "grop"}, "expected one of"),
        ({"num_prompts": 0}, "num_prompts: expected at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate: expected at least 0"),
        ({"task": "gsm8k"}, "task gsm8k: expected a model"),
        ({"task": "gsm8k", "model": "y"}, "task gsm8k: expected data"),
        ({"data": "train.jsonl"}, "takes no data"),
        ({"num_generations": 1}, "num_generations: expected at least 2, .* comparison .* got 1"),
        ({"preset": "lmbok"}, "preset: expected one of"),
        ({"preset": "lmbook"}, "task gsm8k: expected a model"),
        (JSONL, "task jsonl: expected a reward"),
        (JSONL | {"reward": ["f"]}, "reward: expected FILE.py:function, got 'f'"),
        (JSONL | {"reward": ["no/file.py:f"]}, "reward: expected a file at no/file.py"),
        ({"reward_weight": [1.0]}, "reward_weight: no effect without reward"),
        ({"accuracy": "correct"}, "accuracy: expected REWARD=NUMBER"),
        ({"accuracy": "correct=nan"}, "accuracy: expected REWARD=NUMBER"),
        (
            JSONL | {"reward": ["f"], "reward_weight": [float("nan")]},
            r"reward_weight: expected finite numbers, got \[nan\]",
        ),
        ({"lora_rank": 4}, "lora_rank: expected a model"),
        ({"lora_alpha": 4.0}, "lora_alpha: no effect without lora_rank"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules: no effect without"),
        ({"ref_model_sync_steps": 5, "beta": 0.0}, "ref_model_sync_steps: no effect with beta 0"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps: expected at least 0"),
        (
            {"lr_warmup_steps": 7, "max_steps": 2, "num_iterations": 3},
            "lr_warmup_steps: expected at most 6, .* max_steps times num_iterations, got 7",
        ),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"seed": 2**32}, "seed: expected below"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number, got inf"),
        ({"dtype": "float16"}, "dtype: expected one of .*'bfloat16'.*, got 'float16'"),
        ({"lr_scheduler_type": "sine"}, "lr_scheduler_type: expected one of .* got 'sine'"),
        ({"sparsity": 1.0}, "sparsity: expected 0 or"),
        ({"max_minutes": 0.0}, "max_minutes: expected a positive number"),
        ({"loss_option": ["epsilon=0.1"]}, "loss_option: expected key=value with a key among"),
        ({"loss_option": ["epsilon_high"]}, "loss_option: expected key=value"),
        ({"loss_option": ["epsilon_high=big"]}, "loss_option epsilon_high: expected float"),
        ({"loss_option": ["beta=0.1"]}, "as --beta"),
        ({"loss_option": ["delta=3", "delta=4"]}, "expected delta once"),
        ({"loss_option": ["surrogate_parameters=3"]}, "loss_option surrogate_parameters"),
        ({"loss_option": ["correction_max=3"]}, "correction_max=3.0 has no effect"),
        (
            {"task": "gsm8k", "data": "x", "model": "y", "warmup_steps": 9},
            "warmup_steps: no effect",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_settings_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)


def test_defaults_depend_on_the_task() -> None:
    real = TrainConfig(task="gsm8k", data="x", model="y")
    assert (real.num_generations, real.beta, real.learning_rate) == (16, 0.04, 1e-6)
    assert real.loss_config() == fastgrpo.LossConfig.preset("grpo", beta=0.04, entropy="detached")
    assert TrainConfig(loss="dr_grpo").loss_config().max_completion_length == 5


def test_a_preset_gives_defaults_and_what_is_given_stays() -> None:
    files = {"data": "x", "model": "y"}
    config = TrainConfig(preset="lmbook", **files)
    assert (config.task, config.num_generations, config.learning_rate) == ("gsm8k", 16, 5e-6)
    assert (config.lr_scheduler_type, config.lr_warmup_steps) == ("constant_with_warmup", 0)
    assert config.gradient_checkpointing and config.ref_model_sync_steps == 500
    expected = LossConfig(beta=0.04, epsilon_low=0.1, epsilon_high=0.1, entropy="detached")
    assert config.loss_config() == expected
    own = TrainConfig(
        preset="lmbook", learning_rate=1e-6, loss_option=["epsilon_high=0.2"], num_iterations=3,
        **files,
    )  # fmt: skip
    assert (own.learning_rate, own.num_iterations) == (1e-6, 3)
    assert own.loss_config() == dataclasses.replace(expected, epsilon_high=0.2)


def test_task_and_loss_beside_a_preset_win() -> None:
    own = TrainConfig(preset="lmbook", task="sums", model="y", loss="dapo")
    assert (own.task, own.learning_rate, own.num_generations) == ("sums", 5e-6, 16)
    assert own.loss_config() == LossConfig.preset("dapo", beta=0.04, entropy="detached")
    assert dataclasses.replace(own, seed=1).loss_config() == own.loss_config()


def test_a_preset_without_its_kl() -> None:
    own = TrainConfig(preset="lmbook", task="sums", model="y", beta=0.0)
    assert (own.beta, own.ref_model_sync_steps) == (0.0, 0)
    assert own.loss_config() == LossConfig(epsilon_low=0.1, epsilon_high=0.1, entropy="detached")


def test_the_learning_rate_rises_in_all_steps_at_most() -> None:
    assert TrainConfig(max_steps=3, num_iterations=2).lr_warmup_steps == 6
    assert TrainConfig().lr_warmup_steps == DEFAULTS["lr_warmup_steps"]
    assert TrainConfig(max_steps=6, lr_warmup_steps=6).lr_warmup_steps == 6


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_with_a_kl_brings_its_weight(name: str) -> None:
    expected = LossConfig.preset(name).beta or TASK_DEFAULTS["arithmetic"]["beta"]
    assert TrainConfig(loss=name).loss_config().beta == expected
    assert TrainConfig(loss=name, beta=0.5).loss_config().beta == 0.5


def test_the_policy_becomes_the_reference_after_every_so_many_steps() -> None:
    def starts(every: int) -> list[int]:
        config = TrainConfig(ref_model_sync_steps=every)
        return [step for step in range(1, 8) if config.starts_iteration(step)]

    assert starts(0) == [] and starts(3) == [4, 7] and starts(1) == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "beta"])
def test_every_field_of_a_loss_can_be_set(name: str) -> None:
    """Written as a text, its own default comes back with its type."""
    (field,) = (f for f in dataclasses.fields(LossConfig) if f.name == name)
    shown = field.default if isinstance(field.default, str) else json.dumps(field.default)
    if name == "surrogate_parameters":
        assert loss_options([name + '={"kappa": 2.0}']) == {name: {"kappa": 2.0}}
        return
    value = loss_options([f"{name}={'none' if field.default is None else shown}"])[name]
    assert value == field.default and type(value) is type(field.default)


def test_optional_numbers_of_a_loss_have_their_type() -> None:
    given = loss_options(["max_completion_length=7", "delta=3", "correction_max=2"])
    assert [type(value) for value in given.values()] == [int, float, float]
    assert TrainConfig(loss="dapo", loss_option=["delta=3"]).loss_config().delta == 3.0


def test_a_command_line_may_repeat_a_flag(rewards) -> None:
    config = parse_flags(
        ["--task", "jsonl", "--data", "x", "--model", "y", "--reward", f"{rewards}:short",
         "--reward", f"{rewards}:same", "--reward-weight", "0.5", "2", "--accuracy", "same=1",
         "--loss-option", "delta=3", "--loss-option", "epsilon_high=0.3", "--loss", "dapo"]
    )  # fmt: skip
    assert [path.rpartition(":")[2] for path in config.reward] == ["short", "same"]
    assert config.reward_weight == [0.5, 2.0] and config.accuracy_threshold() == ("same", 1.0)
    assert config.loss_config() == LossConfig.preset(
        "dapo", delta=3.0, epsilon_high=0.3, entropy="detached"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-generations", "1"], "error: num_generations: expected at least 2"),
        (["--batch-size", "8"], "error: expected flags that --help lists, got --batch-size 8"),
        (["--max-steps", "many"], "many"),
    ],
)
def test_a_wrong_command_line_ends_with_one_line(capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_flags(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("reward", "weights", "message"),
    [
        (["{}:long"], [], r"expected one of \['same', 'short'\] of .*, got 'long'"),
        (["{}:short", "{}:same"], [1.0], "reward_weight: expected one for each of 2 rewards"),
        (["{}:short", "{}:short"], [], "expected functions of different names"),
    ],
)
def test_rewards_are_found_before_a_model_is_loaded(rewards, reward, weights, message) -> None:
    paths = [path.format(rewards) for path in reward]
    with pytest.raises(ValueError, match=message):
        TrainConfig(**JSONL, reward=paths, reward_weight=weights)


@pytest.mark.parametrize(
    ("text", "error"),
    [("1 / 0\n", "ZeroDivisionError"), ("import sys\nsys.exit(0)\n", r"SystemExit\(0\)")],
    ids=["raises", "exits"],  # as a script without `if __name__ == "__main__"` does
)
def test_a_reward_file_that_fails_is_named(tmp_path, text, error) -> None:
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ValueError, match=f"expected that broken.py runs, got {error}"):
        TrainConfig(**JSONL, reward=[f"{tmp_path}/broken.py:f"])


def test_a_reward_file_may_have_dataclasses(tmp_path) -> None:
    """They look for the module among those that are imported."""
    (tmp_path / "typed.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "@dataclass\n"
        "class Judge:\n"
        "    best: ClassVar[float] = 1.0\n"
        "    weight: float = 2.0\n"
        "def f(completions):\n"
        "    return [Judge.best * Judge().weight for _ in completions]\n"
    )
    (reward,) = load_rewards([f"{tmp_path}/typed.py:f"], None)
    assert reward.function([""]) == [2.0]


def test_a_loss_may_bring_its_advantages() -> None:
    assert TrainConfig().advantage_estimator == "grpo"
    assert TrainConfig(loss="dr_grpo").advantage_estimator == "dr_grpo"
    assert TrainConfig(loss="dr_grpo", advantage_estimator="rloo").advantage_estimator == "rloo"
    with pytest.raises(ValueError, match="advantage_estimator: expected one of .* got 'gpg'"):
        TrainConfig(advantage_estimator="gpg")


def test_the_help_shows_every_default(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default:" not in shown
    assert "By default 16.0." in shown  # the same for all
    assert "By default 200, sums: " in shown  # of tasks
