"""Wheels and editable installs: what can be imported, from where, and beside other packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"fastgrpo": ROOT / "fastgrpo", "fastgrpo_kernels": ROOT / "kernels/fastgrpo_kernels"}
# From the metadata: looking for pip as a module takes setuptools' distutils away from this process,
# and torch.compile fails without.
INSTALLED = {distribution.name for distribution in distributions()}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not {"hatchling", "pip"} <= INSTALLED, reason="builds with both"),
]
# Nothing is downloaded: the build backend is the one of this environment.
OFFLINE = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]


def pip(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], check=True)


class Install(NamedTuple):
    """An environment of its own with an editable install of a clone called fastgrpo."""

    python: Path
    clone: Path
    site_packages: Path

    def run(self, block: str, cwd: Path) -> str:
        # A PYTHONPATH may lead to this tree, whatever the install does.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [self.python, "-c", block], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Install:
    """The environment before the install: torch and transformers, no fastgrpo."""
    folder = tmp_path_factory.mktemp("somewhere")
    clone = folder / "fastgrpo"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs")
    shutil.copytree(ROOT, clone, ignore=ignored)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site_packages,) = (folder / "venv/lib").glob("python*/site-packages")
    # As plain entries: the .pth files in those folders, an editable fastgrpo's too, have no effect.
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    (site_packages / "outer.pth").write_text("\n".join(packages))
    return Install(folder / "venv/bin/python", clone, site_packages)


@pytest.fixture(scope="module")
def installed(bare: Install) -> Install:
    with_attributes = "import fastgrpo; print(hasattr(fastgrpo, 'grpo_loss'))"
    assert bare.run(with_attributes, bare.clone.parent) == "False", "an empty namespace, so far"
    pip("--python", bare.python, "install", *OFFLINE, "--ignore-installed", "-e", bare.clone)
    return bare


STAND_IN = """
class Anything:
    def __init__(self, *args, **kwargs):
        pass

def decorator(*args, **kwargs):
    return lambda decorated: decorated

def __getattr__(name):
    return Anything if name[0].isupper() else decorator
"""


@pytest.fixture
def hugging_face_kernels(installed: Install):
    """Hugging Face's `kernels`, or what passes for it."""
    package = installed.site_packages / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    metadata = installed.site_packages / "kernels-0.18.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    yield package
    shutil.rmtree(package)
    shutil.rmtree(metadata)


@pytest.mark.parametrize("folder", ["..", ".", "kernels", "/"])
def test_an_editable_install_works_from_any_folder(installed, folder):
    """From the clone's parent the clone itself, called fastgrpo, could be taken for the package."""
    printed = installed.run(
        "import fastgrpo, fastgrpo_kernels; fastgrpo.grpo_loss, fastgrpo_kernels.token_loss\n"
        "print(fastgrpo.__file__, fastgrpo_kernels.__file__, sep='\\n')",
        installed.clone / folder,
    )
    assert printed.splitlines() == [
        str(installed.clone / "fastgrpo/__init__.py"),
        str(installed.clone / "kernels/fastgrpo_kernels/__init__.py"),
    ]


TINY_MODEL = """
import fastgrpo, torch, transformers
from transformers.utils.import_utils import is_kernels_available
config = transformers.Qwen2Config(
    vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1,
)
ids = torch.arange(6)[None]
model = transformers.Qwen2ForCausalLM(config)
hidden = model.base_model(ids).last_hidden_state[:, :-1]
fastgrpo.linear_logps(hidden, model.lm_head.weight, ids[:, 1:]).logps.sum().backward()
assert model.lm_head.weight.grad.any()
print(is_kernels_available())
"""


@pytest.mark.skipif("kernels" in INSTALLED, reason="Hugging Face's kernels is installed")
@pytest.mark.parametrize("folder", ["..", "."])
def test_transformers_does_not_take_our_kernels_for_hugging_faces(installed, folder):
    assert installed.run(TINY_MODEL, installed.clone / folder) == "False"


@pytest.mark.parametrize("folder", ["..", "."])
def test_hugging_faces_kernels_is_theirs(installed, hugging_face_kernels, folder):
    block = TINY_MODEL + "import kernels; print(kernels.__file__)"
    available, path = installed.run(block, installed.clone / folder).splitlines()
    assert available == "True" and Path(path).parent == hugging_face_kernels


@pytest.mark.parametrize("name", ["tests", "benchmarks", "docs", "examples", "kernels"])
@pytest.mark.parametrize("regular", [True, False], ids=["package", "folder"])
def test_folders_of_others_are_not_shadowed(installed, tmp_path, name, regular):
    """The clone's root is on the path; what is called the same elsewhere comes first."""
    theirs = tmp_path / name
    theirs.mkdir()
    (theirs / "conftest.py").write_text("")
    if regular:
        (theirs / "__init__.py").write_text("")
    printed = installed.run(f"import {name}.conftest as c; print(c.__file__)", tmp_path)
    assert printed == str(theirs / "conftest.py")


def test_a_wheel_holds_the_two_packages_and_nothing_else(tmp_path):
    pip("wheel", *OFFLINE, "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {
        f"{name}/{path.relative_to(source).as_posix()}"
        for name, source in PACKAGES.items()
        for path in [*source.rglob("*.py"), source / "py.typed"]
    }
    assert {name for name in names if ".dist-info/" not in name} == wanted
