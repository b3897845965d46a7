"""Reward functions: TRL's signature, and where they come from.

    def f(prompts, completions, **columns) -> list[float | None]

One number for each completion; None where the reward does not apply. ``completions`` are texts; of
a task whose prompts are conversations, lists of one message, and ``prompts`` are the conversations.
Every further field of the data is a column: a list with its value for each completion.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Reward:
    """A reward function with its name in the logs and its weight in the sum.

    ``file`` is the Python file that it is from, if it is one of the user's.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    file: str | None = None


class WrongResult(ValueError):
    """A reward function returned something else than one number for each completion."""


@dataclass(frozen=True)
class Accuracy:
    """A completion is right if ``function`` gives it at least ``threshold``."""

    function: RewardFunction
    threshold: float = 1.0


def one_by_one(judge: Callable[[str, str], float | None]) -> RewardFunction:
    """Return a reward function from one that judges a completion's text beside the answer."""

    def function(completions: Sequence[Any], answer: Sequence[str]) -> list[float | None]:
        return [judge(text_of(c), a) for c, a in zip(completions, answer, strict=True)]

    return function


def text_of(completion: str | Sequence[Mapping[str, str]]) -> str:
    """Return the text of a completion, which may be a list of one message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def accepted(name: str, function: RewardFunction, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``given`` that the function takes, as its keyword arguments.

    A parameter without a default that is not among them is a ValueError.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        taken = dict(given)
    else:
        taken = {p.name: given[p.name] for p in parameters if p.name in given}
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in variadic and p.name not in taken
    ]
    if missing:
        raise ValueError(
            f"reward {name}: expected parameters among {sorted(given)}, the columns of the data, "
            f"got {missing} without a default"
        )
    return taken


def numbers_of(name: str, result: object) -> list[float | None]:
    """Return what a reward function returned; WrongResult for what is no list of numbers.

    A text and a mapping are none, though both can be read as one.
    """
    try:
        if isinstance(result, (str, bytes, Mapping, Set)):
            raise TypeError
        return [None if value is None else float(value) for value in result]
    except TypeError as error:
        raise WrongResult(
            f"reward {name}: expected a list of numbers or None, got {result!r:.200}"
        ) from error


def load_rewards(paths: Sequence[str], weights: Sequence[float] | None) -> tuple[Reward, ...]:
    """Return the functions that ``paths`` name, each FILE.py:function, with their weights.

    A file is run once, and finds modules beside it. What is missing is a ValueError.
    """
    if weights is not None and len(weights) != len(paths):
        raise ValueError(
            f"reward_weight: expected one for each of {len(paths)} rewards, got {list(weights)}"
        )
    functions = [_function(path) for path in paths]
    names = [path.rpartition(":")[2] for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"reward: expected functions of different names, got {names}")
    files = [str(Path(path.rpartition(":")[0]).resolve()) for path in paths]
    return tuple(map(Reward, names, functions, weights or [1.0] * len(names), files))


def _function(path: str) -> RewardFunction:
    file, separator, name = path.rpartition(":")
    if not (separator and file.endswith(".py") and name.isidentifier()):
        raise ValueError(f"reward: expected FILE.py:function, got {path!r}")
    if not Path(file).is_file():
        raise ValueError(f"reward: expected a file at {file}, got none")
    return function_of(str(Path(file).resolve()), name)


def function_of(file: str, name: str) -> RewardFunction:
    """Return a function of a Python file, given by its whole path; ValueError if there is none."""
    found = vars(_module(file))
    if not callable(found.get(name)):
        functions = sorted(n for n, f in found.items() if inspect.isfunction(f))
        raise ValueError(f"reward: expected one of {functions} of {file}, got {name!r}")
    return found[name]


@lru_cache
def _module(file: str) -> Any:
    path = Path(file)
    # A name with a slash hides no module that someone imports. Dataclasses look for it, and so does
    # pickle for the functions of a pool of processes, which takes a dot for that of a package.
    name = file.replace(".", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that calls sys.exit or parses sys.argv
        raise ValueError(f"reward: expected that {path.name} runs, got {error!r}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module
