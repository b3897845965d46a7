"""Nothing that we ship runs what it reads, or listens beyond loopback: from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    path for name in ("fastgrpo", "kernels", "examples", "benchmarks")
    for path in (ROOT / name).rglob("*.py")
)  # fmt: skip
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
RUNS_COMMANDS = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"
}  # fmt: skip
UNPICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADS = {"torch.load", "torch.jit.load", "torch.serialization.load"}
# torch.distributed.checkpoint: the reader of its pickled metadata, and what takes it by default.
UNPICKLING_READERS = {"FileSystemReader", "FsspecReader"}
LOADS_PARTS = ("checkpoint.load", "dcp.load", "checkpoint.load_state_dict", "dcp.load_state_dict")
LISTENING_MODULES = {
    "http.server", "socketserver", "xmlrpc.server", "wsgiref", "uvicorn", "flask", "gradio"
}  # fmt: skip
LISTENS = {"socket.create_server", "asyncio.start_server", "multiprocessing.connection.Listener"}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
EVERYWHERE = {"", "0.0.0.0", "::"}
ASKED_FOR = {"trust_remote_code", "shell", "allow_pickle"}  # keywords that must be False


def faults(tree: ast.AST) -> Iterator[str]:
    """What a tree has that it must not have."""
    names = imported(tree)
    safe_loads = set()
    for module in names.values():
        yield from faults_of_module(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):
            yield from faults_of_option(node.arg, node.value)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield from faults_of_option(key.value, value)
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and any(a in node.value for a in ("0.0.0.0", "[::]")):
                yield f"listens on {node.value}"
        elif isinstance(node, ast.Call):
            yield from faults_of_call(node, names)
            if constant_options(node).get("weights_only") is True:
                safe_loads.add(node.func)
        elif isinstance(node, (ast.Name, ast.Attribute)):  # also where it is only handed on
            name = name_of(node, names)
            if name in RUNS_TEXT | RUNS_COMMANDS or name == "__builtins__":
                yield name
            if name in LOADS and node not in safe_loads:
                yield f"{name} without weights_only=True"
            if name.split(".")[-1] in UNPICKLING_READERS:
                yield name


def imported(tree: ast.AST) -> dict[str, str]:
    """The whole name of what each name stands for that an import of the file has made."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                found[alias.asname or alias.name] = f"{base}.{alias.name}"
    return found


def name_of(node: ast.AST, names: dict[str, str]) -> str:
    """The whole dotted name of an expression, as far as it has one; that of a builtin is short.

    ``getattr`` of a constant is an attribute.
    """
    if isinstance(node, ast.Attribute):
        name = f"{name_of(node.value, names)}.{node.attr}"
    elif isinstance(node, ast.Name):
        name = names.get(node.id, node.id)
    elif (
        isinstance(node, ast.Call)
        and name_of(node.func, names) == "getattr"
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    ):
        name = f"{name_of(node.args[0], names)}.{node.args[1].value}"
    else:
        return ""
    return name.removeprefix("builtins.")


def faults_of_module(name: str) -> Iterator[str]:
    """Those of a module, or of a name of one, that is imported."""
    parts = name.split(".")
    above = {".".join(parts[: i + 1]) for i in range(len(parts))}
    short = name.removeprefix("builtins.")
    if above & (UNPICKLES | LISTENING_MODULES) or short in RUNS_TEXT | RUNS_COMMANDS:
        yield f"import {name}"


def faults_of_option(name: object, value: ast.expr) -> Iterator[str]:
    """Those of a keyword, or of a key of a mapping that may become one."""
    given = value.value if isinstance(value, ast.Constant) else None
    if name in ASKED_FOR and given is not False:
        yield f"{name}={ast.unparse(value)}"
    if name == "host" and given in EVERYWHERE:
        yield f"host={given!r}"


def constant_options(call: ast.Call) -> dict[str | None, object]:
    return {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}


def faults_of_call(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = name_of(call.func, names)
    if name == "getattr" and len(call.args) > 1:
        owner, taken = name_of(call.args[0], names), name_of(call, names)
        hidden = not isinstance(call.args[1], ast.Constant)
        if taken in RUNS_TEXT | RUNS_COMMANDS or (hidden and owner in {"builtins", "os"}):
            yield f"getattr of {owner}"
        if taken in LOADS:
            yield taken
    if name == "importlib.import_module" and isinstance(call.args[0], ast.Constant):
        yield from faults_of_module(call.args[0].value)
    if name.endswith(LOADS_PARTS) and "storage_reader" not in {k.arg for k in call.keywords}:
        yield f"{name} without a storage_reader"
    of_socket = name.endswith(".bind") and any(n.split(".")[0] == "socket" for n in names.values())
    address = call.args[0] if call.args else None
    tuple_given = isinstance(address, ast.Tuple) and name.endswith(".bind")
    if name in LISTENS or of_socket or tuple_given:
        host = address.elts[0] if isinstance(address, ast.Tuple) else None
        if not (isinstance(host, ast.Constant) and host.value in LOOPBACK):
            yield f"{name} beyond loopback"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(path: Path) -> None:
    assert not list(faults(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "text",
    [
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "load(name, **{'trust_remote_code': True})",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=given)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path)",
        "import torch as t\nt.load(path)",
        "map(torch.load, paths)",
        "getattr(torch, 'load')(path)",
        "dcp.load(state, checkpoint_id=folder)",
        "from torch.distributed.checkpoint import load\nload(state)",
        "torch.distributed.checkpoint.load(state, storage_reader=FileSystemReader(folder))",
        "import pickle",
        "import pickle as p",
        "import torch, dill.source",
        "from cloudpickle import loads",
        "importlib.import_module('pickle')",
        "eval(text)",
        "exec(compile(text, name, 'exec'))",
        "run = eval",
        "from builtins import eval",
        "from builtins import exec as run",
        "import builtins as b\nb.eval(text)",
        "import builtins\ngetattr(builtins, 'ev' + 'al')(text)",
        "getattr(builtins, 'eval')(text)",
        "__builtins__['eval'](text)",
        "os.system(command)",
        "from os import system",
        "from os import popen as run",
        "import os as o\no.system(command)",
        "getattr(os, 'system')(command)",
        "import os\ngetattr(os, name)(command)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=given)",
        "subprocess.run(command, **{'shell': True})",
        "np.load(path, allow_pickle=True)",
        "server.bind(('', 80))",
        "import socket\nserver.bind(address)",
        "from socket import socket\nserver.bind(('0.0.0.0', 80))",
        "from socket import create_server\ncreate_server(('', 80))",
        "import multiprocessing.connection as c\nc.Listener(address)",
        "launch(host='0.0.0.0')",
        "launch(host='')",
        "url = 'tcp://0.0.0.0:80'",
        "from http.server import HTTPServer",
        "from http import server",
        "import uvicorn",
    ],
)
def test_what_is_looked_for_is_found(text: str) -> None:
    assert list(faults(ast.parse(text)))


def test_what_is_harmless_is_not() -> None:
    text = """
import socket
from re import compile as pattern
from torch import load
checkpoint.load(state, storage_reader=reader)
torch.load(path, weights_only=True)
load(path, weights_only=True)
model.eval()
pattern(x)
torch.compile(model)
getattr(config, name)
subprocess.run([program], shell=False)
server.bind(("127.0.0.1", 0))
socket.create_server(("localhost", 0))
"""
    assert not list(faults(ast.parse(text)))
    assert not list(faults(ast.parse("inspect.signature(f).bind(*args)\nsignature.bind(x)")))
