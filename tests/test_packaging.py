"""The layers import downwards only, and a loss needs nothing but torch and Triton."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import fastgrpo

ROOT = Path(__file__).parent.parent
# What each room of fastgrpo/, or file beside the rooms, may import of the others.
ROOMS = {
    "autocast": set(),
    "checks": set(),
    "packing": {"checks"},
    "torch_kernels": set(),
    "backend": set(),
    "low_rank": set(),
    "support": {"checks", "packing"},
    # Everything vocabulary-sized: knows nothing of losses but a function from log-probs.
    "head": {"packing", "backend", "torch_kernels"},
    # Chooses between the backends; its self-check compares them through `head`.
    "dispatch": {"backend", "head", "torch_kernels"},
    # What is optimised: knows nothing of the vocabulary.
    "objective": {"checks", "packing", "backend", "dispatch"},
    "advantages": {"checks", "backend", "dispatch"},
    "ops": {"checks", "packing", "backend", "head", "dispatch", "objective"},
    "doctor": {"dispatch"},
    "logps": {"autocast", "checks", "low_rank", "ops", "support"},
    "selected": {"autocast", "checks", "logps", "ops"},
    "loss": {"autocast", "checks", "low_rank", "ops", "support", "logps", "head", "objective"},
    "model": {"checks", "logps", "loss", "objective", "support"},
    "train": {"advantages", "checks", "logps", "loss", "model", "objective"},
    # Adapters: they call what everybody may call.
    "integrations": set(),
}
BESIDE = {"reference", "testing"}  # for tests and benchmarks


def module(path: Path) -> str:
    """The dotted name of a file; a package's is that of its folder."""
    root = ROOT / "kernels" if ROOT / "kernels" in path.parents else ROOT
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """What a file imports, inside functions and under TYPE_CHECKING too, and the names it takes."""
    found = set()
    package = module(path) if path.name == "__init__.py" else module(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found


def test_every_room_imports_what_it_may():
    rooms = set()
    for path in (ROOT / "fastgrpo").rglob("*.py"):
        room = path.relative_to(ROOT / "fastgrpo").parts[0].removesuffix(".py")
        rooms.add(room)
        if room in BESIDE or room == "__init__":
            continue
        for used in imports(path):
            package, _, rest = used.partition(".")
            other = rest.partition(".")[0]
            if package == "fastgrpo" and other in ROOMS.keys() | BESIDE and other != room:
                assert other in ROOMS[room], f"{path} imports {used}"
    assert rooms == set(ROOMS) | BESIDE | {"__init__"}


def test_no_import_circle():
    paths = [*(ROOT / "fastgrpo").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = {module(path) for path in paths}
    graph = {}
    for path in paths:
        used = imports(path) & names
        # `from package import module` needs the module; the package is there already.
        graph[module(path)] = used - {name.rpartition(".")[0] for name in used} - {module(path)}
    assert {"fastgrpo.objective.rules", "fastgrpo.objective.fields"} <= graph.keys()
    assert "fastgrpo.objective.fields" in graph["fastgrpo.objective.rules"]
    assert "fastgrpo.train.model" in graph["fastgrpo.train.rollout"]  # a relative import
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "fastgrpo_kernels"} | set(sys.stdlib_module_names)
    for path in (ROOT / "kernels").rglob("*.py"):
        for used in imports(path):
            assert used.split(".")[0] in allowed, f"{path} imports {used}"


def test_kernels_is_no_package():
    """An importable `kernels` would shadow Hugging Face's, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run(block: str) -> str:
    """The block in a fresh process that finds the tree; what it prints."""
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(
        [sys.executable, "-c", block], env=path, check=True, capture_output=True, text=True
    ).stdout


WITHOUT = """
import sys
for name in {missing}:
    sys.modules[name] = None
import torch, fastgrpo
hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
ids = torch.ones(2, 3, dtype=torch.long)
fastgrpo.grpo_loss(hidden, weight, ids, ids.bool(), torch.tensor([1.0, -1.0])).loss.backward()
assert hidden.grad.any() and weight.grad.any()
"""


def test_a_loss_needs_no_triton_and_no_gpu():
    """What a machine without Triton sees."""
    block = WITHOUT.format(missing=["triton"]) + (
        "try:\n"
        "    fastgrpo.linear_logps(hidden, weight, ids, backend='triton')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    assert "triton package" in run(block)


EXTRA = ["transformers", "matplotlib", "tqdm"]


def test_a_loss_needs_torch_and_triton_alone():
    """fastgrpo.train needs more, and says which extra has it."""
    block = WITHOUT.format(missing=EXTRA) + (
        "try:\n"
        "    import fastgrpo.train.rollout\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    message = run(block)
    assert "pip install 'fastgrpo[train]'" in message
    assert all(f"no {name}" in message for name in EXTRA)


def test_integrations_import_public_names_only():
    public = {f"fastgrpo.{name}" for name in fastgrpo.__all__}
    paths = list((ROOT / "fastgrpo" / "integrations").rglob("*.py"))
    for path in paths:
        for used in imports(path):
            ours = used.startswith("fastgrpo.") and not used.startswith("fastgrpo.integrations")
            assert not ours or used in public, f"{path} imports {used}"
    assert len(paths) > 2


def test_a_loss_needs_no_trainer():
    """The adapter needs the trainer, and says which extra has it."""
    missing = ["trl", "accelerate", "datasets"]
    block = WITHOUT.format(missing=missing) + (
        "try:\n"
        "    import fastgrpo.integrations.trl\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)\n"
    )
    message = run(block)
    assert "pip install 'fastgrpo[trl]'" in message
    assert all(f"no {name}" in message for name in missing)


def test_the_map_of_the_loop_has_every_module_once():
    package = ROOT / "fastgrpo" / "train"
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    names = sorted(name for line in lines for name in line[4:36].replace(",", " ").split())
    assert names == sorted(path.stem for path in package.glob("[!_]*.py"))
