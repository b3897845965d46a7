"""The layers import downwards only; what a wheel holds, and what its users import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What each room of fastgrpo/, or file beside the rooms, may import of the others.
ROOMS = {
    "checks": set(),
    "packing": set(),
    "torch_kernels": set(),
    "backend": {"torch_kernels"},
    # Everything vocabulary-sized.
    "head": {"torch_kernels", "packing", "objective"},
    # What is optimised: knows nothing of the vocabulary.
    "objective": {"checks", "packing", "backend"},
    "advantages": {"checks", "backend"},
    "ops": {"checks", "packing", "backend", "head", "objective"},
    "logps": {"checks", "ops"},
    "loss": {"checks", "ops", "logps", "head", "objective"},
    "train": {"advantages", "logps", "loss", "objective"},
}
BESIDE = {"reference", "testing"}  # for tests and benchmarks


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # within the package
                continue
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
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
