"""The layers import downwards only, and the tree stays installable."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A module may import only from the layers before its own.
LAYERS = [
    {"values", "presets"},
    {"choices", "config"},
    {"fallback_logits"},
    {"fallback_entries"},
    {"fallback", "backend", "checks"},
    {"tiles", "packing"},
    {"gradients", "corrections", "contexts"},
    {"policy"},
    {"chunked"},
    {"sparse"},
    {"fused"},
    {"ops"},
    {"logps", "estimators", "normalizer"},
    {"advantages", "rewards"},
    {"loss"},
    {"train"},
]
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


def test_fastgrpo_imports_downwards():
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    modules = [p for p in (ROOT / "fastgrpo").rglob("*.py") if p.name != "__init__.py"]
    assert len(modules) > 12
    for path in modules:
        name = path.relative_to(ROOT / "fastgrpo").parts[0].removesuffix(".py")
        for used in imports(path):
            parts = used.split(".")
            if parts[0] != "fastgrpo" or len(parts) < 2 or name in BESIDE:
                continue
            assert parts[1] not in BESIDE, f"{path} imports {used}"
            if parts[1] in layer and parts[1] != name:
                below_or_beside = layer[parts[1]] <= layer[name]
                assert below_or_beside, f"{path} imports {used}"


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
