"""The two backends implement the protocol, and launchers take operands such as `Head` whole."""

from __future__ import annotations

import ast
import inspect
import typing
from pathlib import Path

import pytest

import fastgrpo_kernels
from fastgrpo import torch_kernels
from fastgrpo.backend import Kernels

ROOT = Path(__file__).parent.parent
BACKENDS = {"triton": fastgrpo_kernels, "torch": torch_kernels}
FUNCTIONS = [name for name, x in vars(Kernels).items() if inspect.isfunction(x) and name[0] != "_"]
MEMBERS = {name: x.fget for name, x in vars(Kernels).items() if isinstance(x, property)}
CAPABILITIES = list(MEMBERS)


def names_of(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_a_backend_has_every_function_under_the_names_of_the_protocol(backend):
    assert len(FUNCTIONS) >= 10 and len(CAPABILITIES) >= 4
    for name in FUNCTIONS:
        declared, offered = (names_of(getattr(x, name)) for x in (Kernels, backend))
        assert declared == offered, name


@pytest.mark.parametrize("name", CAPABILITIES)
def test_what_a_backend_does_without_is_none(name):
    offered = [getattr(backend, name) for backend in BACKENDS.values()]
    assert offered.count(None) == 1, "one of the two has it, or it is no capability"
    (function,) = (x for x in offered if x is not None)
    declared, _ = typing.get_args(typing.get_type_hints(MEMBERS[name])["return"])
    if isinstance(declared, type):
        assert names_of(declared.__call__) == names_of(function)
    else:
        arguments, _ = typing.get_args(declared)
        assert len(names_of(function)) == len(arguments)


def test_no_function_takes_more_than_eight_arguments():
    """But for the public ones, whose options are the user's, kernels, and the ops' flat schemas."""
    public = set(ast.literal_eval(_assigned(ROOT / "fastgrpo" / "__init__.py", "__all__")))
    long = {}
    for path in [*(ROOT / "fastgrpo").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        if path.name in ("reference.py", "testing.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or node.name in public | {"forward"}:
                continue
            decorators = " ".join(ast.unparse(d) for d in node.decorator_list)
            if any(word in decorators for word in ("jit", "custom_op", "register_fake")):
                continue
            arguments = node.args
            count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
            if count > 8:
                long[f"{path.name}:{node.name}"] = count
    assert not long


def _assigned(path, name):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.unparse(node.value)
    raise AssertionError(name)
