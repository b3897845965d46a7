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
RUNS_COMMANDS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
UNPICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADS = {"torch.load", "torch.jit.load", "torch.serialization.load"}
LISTENS = {"http.server", "socketserver", "xmlrpc.server", "wsgiref"}


def name_of(node: ast.AST) -> str:
    """The dotted name of an expression, as far as it has one."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.AST) -> Iterator[str]:
    """What a tree has that it must not have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            modules = []
        for module in modules:
            if module.split(".")[0] in UNPICKLES or module in LISTENS:
                yield f"import {module}"
        if isinstance(node, ast.keyword):
            given = node.value.value if isinstance(node.value, ast.Constant) else None
            if node.arg == "trust_remote_code" and given is not False:
                yield "trust_remote_code"
            if node.arg == "shell" and given is not False:
                yield "shell"
            if node.arg == "allow_pickle" and given is not False:
                yield "allow_pickle"
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
            yield f"listens on {node.value}"
        if isinstance(node, ast.Call):
            yield from faults_of_call(node)


def faults_of_call(call: ast.Call) -> Iterator[str]:
    name = name_of(call.func)
    given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    if name in RUNS_TEXT or name in RUNS_COMMANDS:
        yield name
    if name in LOADS and given.get("weights_only") is not True:
        yield f"{name} without weights_only=True"
    if name.endswith(".bind") and call.args and isinstance(call.args[0], ast.Tuple):
        host = call.args[0].elts[0]
        if not (isinstance(host, ast.Constant) and host.value in ("127.0.0.1", "localhost", "::1")):
            yield "bind"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(path: Path) -> None:
    assert not list(faults(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "text",
    [
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=given)",
        "import pickle",
        "from cloudpickle import loads",
        "eval(text)",
        "exec(compile(text, name, 'exec'))",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "np.load(path, allow_pickle=True)",
        "server.bind(('', 80))",
        "launch(host='0.0.0.0')",
        "from http.server import HTTPServer",
    ],
)
def test_what_is_looked_for_is_found(text: str) -> None:
    assert list(faults(ast.parse(text)))


def test_what_is_harmless_is_not() -> None:
    text = "torch.load(path, weights_only=True)\nmodel.eval()\nsignature.bind(*args)\nre.compile(x)"
    assert not list(faults(ast.parse(text)))
