"""The layers import downwards only, and the tree stays installable."""

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
    # Everything vocabulary-sized: knows nothing of losses but a function from log-probs.
    "head": {"packing", "backend", "torch_kernels"},
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


def test_import_needs_no_triton_no_transformers_and_no_gpu():
    """What a machine without them sees."""
    block = (
        "import sys\n"
        "sys.modules['triton'] = sys.modules['transformers'] = None\n"
        "import torch, fastgrpo\n"
        "out = fastgrpo.linear_logps(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 2]))\n"
        "assert out.logps.shape == (2,)\n"
        "try:\n"
        "    fastgrpo.linear_logps(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 2]),\n"
        "                          backend='triton')\n"
        "except ValueError as error:\n"
        "    assert 'triton package' in str(error)\n"
        "else:\n"
        "    raise AssertionError('no error')\n"
    )
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", block], env=path, check=True)
