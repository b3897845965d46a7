"""Public names and signatures agree with a snapshot, so that no change is accidental."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path

import fastgrpo

SNAPSHOT = Path(__file__).parent / "public_api.txt"
COMMAND = "python tests/test_public_api.py"


def typed(annotation: object) -> str:
    """As it is written in the source: nothing is evaluated there."""
    return getattr(annotation, "__forward_arg__", annotation)


def defaulted(line: str, default: object, nothing: object) -> str:
    return line if default is nothing else f"{line} = {default!r}"


def signature(name: str, function: Callable) -> list[str]:
    taken = inspect.signature(function)
    lines = [name]
    for p in taken.parameters.values():
        prefix = {p.KEYWORD_ONLY: "keyword ", p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}
        line = f"    {prefix.get(p.kind, '')}{p.name}: {typed(p.annotation)}"
        if p.name != "self":
            lines.append(defaulted(line, p.default, p.empty))
    return [*lines, f"    -> {typed(taken.return_annotation)}"]


def fields(value: type) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [
            defaulted(f"    {field.name}: {field.type}", field.default, dataclasses.MISSING)
            for field in dataclasses.fields(value)
        ]
    annotations = inspect.get_annotations(value)
    return [f"    {name}: {typed(annotations[name])}" for name in getattr(value, "_fields", ())]


def described(name: str, value: Callable) -> list[str]:
    """Of a class what it holds and what it can do, of a function what it takes and returns."""
    if not inspect.isclass(value):
        return signature(name, value)
    lines = [f"class {name}({value.__base__.__name__})", *fields(value)]
    made = [] if lines[1:] else ["__init__"]  # where the fields do not say it
    inherited = [base for base in value.__mro__ if base.__module__.startswith("fastgrpo")]
    members = {name: x for base in reversed(inherited) for name, x in vars(base).items()}
    for member, found in members.items():
        if member.startswith("_") and member not in made:
            continue
        if isinstance(found, property):
            lines.append(f"  {member} -> {typed(inspect.signature(found.fget).return_annotation)}")
        elif inspect.isroutine(found):
            lines += ["  " + line for line in signature(member, getattr(value, member))]
    return lines


def snapshot() -> str:
    names = sorted(fastgrpo.__all__)
    return "\n\n".join("\n".join(described(n, getattr(fastgrpo, n))) for n in names) + "\n"


def test_public_names_and_signatures_are_those_of_the_snapshot():
    assert snapshot() == SNAPSHOT.read_text(), f"if it is meant, `{COMMAND}` takes it down"


def test_all_is_everything_without_an_underscore():
    """What star imports give, and what a completion in an editor shows beside the modules."""
    shown = {
        n for n, value in vars(fastgrpo).items() if n[0] != "_" and not inspect.ismodule(value)
    }
    assert shown == set(fastgrpo.__all__)


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot())
