"""docs/from-reinforce-to-grpo.md: every block runs, every number is in a record."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEXT = (DOCS / "from-reinforce-to-grpo.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
BLOCKS = {
    title: "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    for title, section in SECTIONS.items()
}
# The identities that the document is about; two more sections only report measurements.
DERIVED = [title for title in SECTIONS if BLOCKS[title]]


def run(title: str, namespace: dict) -> None:
    exec(compile(BLOCKS[title], f"from-reinforce-to-grpo.md: {title}", "exec"), namespace)


@pytest.fixture(scope="module")
def namespaces() -> dict[str, dict]:
    """What the blocks before each section have left: a reader runs them in order."""
    torch.set_num_threads(1)
    left, now = {}, {}
    for title in DERIVED:
        left[title] = dict(now)
        try:
            run(title, now)
        except AssertionError:
            pass  # its own test reports it
    return left


@pytest.mark.parametrize("title", DERIVED)
def test_the_identity_holds(title: str, namespaces: dict[str, dict]) -> None:
    assert re.search(r"^\s*assert ", BLOCKS[title], re.MULTILINE)
    run(title, dict(namespaces[title]))


def test_nothing_is_missing() -> None:
    assert set(SECTIONS) - set(DERIVED) == {
        "Does it work with 70M parameters, or 175B?",
        "Side by side",
    }
    assert len(DERIVED) == 11


@pytest.mark.parametrize(
    "title",
    [
        "The log-derivative trick",
        "REINFORCE over tokens is unbiased",
        "The baseline",
        "Ratios of tokens, and clipping",
        "The group as the baseline",
    ],
)
def test_a_wrong_gradient_would_be_noticed(title: str, namespaces: dict[str, dict]) -> None:
    wrong = namespaces[title] | {"g": 1.25 * namespaces[title]["g"]}
    with pytest.raises(AssertionError):
        run(title, wrong)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_record() -> None:
    record = json.loads((DOCS / "figures" / "estimators.json").read_text())
    rows = example("estimators").table(record).splitlines()[1:]
    shown = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[:2] + row.split(" | ")[3:] for row in rows] == shown[1:]
    assert len(rows) == 5


def test_the_numbers_about_dimension_are_those_of_the_record() -> None:
    dimension = example("dimension")
    record = json.loads((DOCS / "figures" / "dimension.json").read_text())
    section = " ".join(SECTIONS["Does it work with 70M parameters, or 175B?"].split())

    def fitted(quantity: str, scaling: str) -> tuple[str, str]:
        curve = dimension.find(record, quantity=quantity, scaling=scaling, method="parameters")
        low, high = curve["interval_95"]
        return f"d^{{{curve['exponent']:.2f}}}$", f"{low:.2f} to {high:.2f}"

    for quantity, scaling in (
        ("variance", "fixed"),
        ("progress", "fixed"),
        ("progress", "growing"),
    ):
        for text in fitted(quantity, scaling):
            assert text in section, text
    small, large = record["extrapolation"]
    assert f"{small['fixed']['variance']:.1e}".replace("+0", "") in section
    assert f"{large['fixed']['variance']:.1e}".replace("+", "") in section
    assert f"{small['growing']['progress']:.0e} and".replace("-0", "-") in section
    assert f"{large['growing']['progress']:.0e}." in section
    for progress in (
        f"{small['fixed']['progress']:.4f}",
        f"{small['over_tokens']['progress']:.2f}",
    ):
        assert progress in section
    assert record["dimensions"][0] == 20 and record["dimensions"][-1] == 2_000_000


@pytest.mark.slow
def test_the_sketches_are_made_by_the_script(tmp_path) -> None:
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DOCS / "figures.py"), "--sketches", "--output-dir", tmp_path]
    subprocess.run(command, env=path, check=True, timeout=120)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clipping.png", "importance.png"]
    texts = [path.read_text() for path in DOCS.glob("*.md")]
    used = {name for text in texts for name in re.findall(r"\(figures/([\w-]+\.\w+)\)", text)}
    assert used == {p.name for p in (DOCS / "figures").iterdir()}
