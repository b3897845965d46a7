"""The pages of losses, advantages and supports say what the code does: tables, blocks, links."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import re
import runpy
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig, count_normalizer
from fastgrpo.head import sparse
from fastgrpo.objective.aggregation import token_weights
from fastgrpo.objective.fields import AGGREGATIONS, ANCHORS, CORRECTIONS, ENTROPY_MODES, REJECTIONS
from fastgrpo.objective.metrics import METRICS
from fastgrpo.objective.presets import PRESETS
from fastgrpo.objective.segments import Sequences
from fastgrpo.testing import make_batch
from fastgrpo_kernels.kl_estimators import KL_ESTIMATORS, KL_GRADIENTS
from fastgrpo_kernels.surrogates import RATIO_LEVELS, SURROGATES
from fastgrpo_kernels.twins import torch_twin

DOCS = Path(__file__).parent.parent / "docs"
NAMES = ("losses.md", "advantages.md", "support.md")
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in NAMES}
LOSSES = PAGES["losses.md"]
BLOCKS = [
    pytest.param(block, id=f"{name}-{i}")
    for name, text in PAGES.items()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
FIELDS = {field.name: field.default for field in dataclasses.fields(LossConfig)}
TRAINERS = (
    "TRL", "verl", "OpenRLHF", "NeMo-RL", "prime-rl", "slime", "SkyRL", "open-instruct", "ROLL",
    "ms-swift",
)  # fmt: skip
MATHS = {"exp": math.exp, "log": math.log, "sign": lambda x: (x > 0) - (x < 0)} | {
    "sg": lambda x: x,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "clip": lambda x, low, high: min(max(x, low), high),
}


def section(title: str) -> str:
    """The text under a heading, its subsections included."""
    level, rest = re.search(rf"^(#+) {re.escape(title)}\n(.*)", LOSSES, re.M | re.S).groups()
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.M)[0]


def table(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the table whose first column is `heading`, by their first cell."""
    _, body = re.split(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n", text, flags=re.M)
    lines = itertools.takewhile(lambda line: line.startswith("|"), body.splitlines())
    rows = [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]
    return {cells[0]: cells[1:] for cells in rows}


def by_name(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name.strip("`"): cells for name, cells in rows.items()}


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def value(expression: str, scope: dict[str, object]) -> float:
    return float(eval(expression, {}, {**MATHS, **scope}))


@pytest.mark.parametrize("names", [
    PRESETS, SURROGATES, KL_ESTIMATORS, KL_GRADIENTS, CORRECTIONS, REJECTIONS, AGGREGATIONS,
    RATIO_LEVELS, ANCHORS, ENTROPY_MODES, METRICS, FIELDS,
])  # fmt: skip
def test_every_name_is_on_the_page(names):
    named = set(re.findall(r"`([^`\n]+)`", LOSSES))
    assert set(names) <= named, set(names) - named


def test_presets():
    rows = by_name(table(section("Presets"), "preset"))
    fields = {name: eval(f"dict({cells[0].strip('`')})") for name, cells in rows.items()}
    assert fields == PRESETS
    cost = {name: 6 if LossConfig.preset(name).separable else 8 for name in PRESETS}
    assert {name: int(cells[1]) for name, cells in rows.items()} == cost


def test_surrogates_have_their_levels_and_fields():
    rows = by_name(table(section("Surrogates"), "`surrogate`"))
    assert list(rows) == list(SURROGATES)
    for name, (_, _, levels, fields, _) in rows.items():
        rule = SURROGATES[name]
        assert tuple(code(levels)) == rule.ratio_levels
        assert set(code(fields)) == set(rule.fields)


@pytest.mark.parametrize("name", SURROGATES)
def test_formulas_of_surrogates(name):
    """L and g of the table, evaluated, are what the kernel's function returns."""
    rows = by_name(table(section("Surrogates"), "`surrogate`"))
    where = re.search(r"```text\n(.*?)```", section("Surrogates"), re.DOTALL)[1]
    rule = SURROGATES[name]
    # Apart from each other and from their defaults, so that none stands for another.
    settings = {"epsilon_low": 0.01, "epsilon_high": 0.3, "delta": 2.5, "proximal_coef": 0.3}
    if name == "cispo_raw":
        settings["epsilon_high"] = 1.3
    config = LossConfig(
        surrogate=name,
        ratio_level=rule.ratio_levels[0],
        **{key: x for key, x in settings.items() if key in rule.fields},
    )
    fields = dataclasses.asdict(config) | {"delta": config.delta or math.inf}
    fn = torch_twin(rule.fn)
    grid = itertools.product(
        (-0.02, -0.6, -3.0), (-2.0, -0.19, -0.01, 0.0, 0.15, 0.4, 1.1), (-1.3, 0.0, 0.7), (0.0, 1.0)
    )
    for l, d, A, c in grid:  # noqa: E741 the page's names
        if l - d > 0:
            continue  # no probability is above 1
        scope = {**fields, "l": l, "d": d, "A": A, "c": c}
        for line in where.splitlines():
            exec(line, {**MATHS, **scope}, scope)
        if "ppo_clip" in rows[name][0]:
            scope["ppo_clip"] = scope["L"] = value(code(rows["ppo_clip"][0])[0], scope)
            scope["g"] = value(code(rows["ppo_clip"][1])[0], scope)
        scope["L"] = value(code(rows[name][0])[0], scope)
        gradient = value(code(rows[name][1])[0], scope)
        given = (torch.tensor(x, dtype=torch.float64) for x in (l, d, A, c))
        loss, slope, _ = fn(*given, *config.parameters)
        assert scope["L"] == pytest.approx(loss.item(), rel=1e-9, abs=1e-12), scope
        assert gradient == pytest.approx(slope.item(), rel=1e-9, abs=1e-12), scope


def test_defaults():
    text = section("Surrogates").split("Defaults are those of `LossConfig`")[1]
    listed = dict(re.findall(r"`(\w+)`\s([\d.e-]+|None)[,.]", text))
    inline = re.findall(r"`(\w+)` \((None|[\d.]+)[;)]", LOSSES)
    assert len(listed) == 18 and len(inline) >= 8
    for name, given in [*listed.items(), *inline]:
        assert ast.literal_eval(given.rstrip(".")) == FIELDS[name], name


def test_aggregations():
    rows = by_name(table(section("Aggregation"), "`aggregation`"))
    assert set(rows) == set(AGGREGATIONS)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    owner = Sequences.of(torch.arange(5) * 3, mask.flatten())
    where = mask.flatten().nonzero()[:, 0]
    prompts = torch.tensor([0, 0, 1, 1])
    known = {"N": 6, "B": 4, "P": 2, "max_completion_length": 5}
    for name, (weight, denominator, _) in rows.items():
        config = LossConfig(
            aggregation=name, **({"max_completion_length": 5} if name == "fixed_length" else {})
        )
        groups = prompts if name == "prompt_mean" else None
        weights = token_weights(config, owner, where, groups, None, torch.float64)
        for row, actual in zip(where.tolist(), weights.tolist(), strict=True):
            n, N_p = mask[row // 3].sum().item(), mask[row // 6 * 2 :][:2].sum().item()
            expected = value(code(weight)[0], {**known, "n": n, "N_p": N_p})
            assert actual == pytest.approx(expected), name
        size = {"group_size": 2} if name == "prompt_mean" else {}
        if name == "token_sum":
            with pytest.raises(ValueError, match="token_sum"):
                count_normalizer(mask, config)
        else:
            assert count_normalizer(mask, config, **size) == value(code(denominator)[0], known)


def test_kl_estimators_and_gradients():
    estimators = by_name(table(section("KL"), "`kl`"))
    gradients = by_name(table(section("KL"), "`kl_gradient`"))
    assert list(estimators) == list(KL_ESTIMATORS) and list(gradients) == list(KL_GRADIENTS)
    for x, r in itertools.product((-1.5, -0.3, 0.01, 0.8), (0.7, 1.0, 1.6)):
        given = torch.tensor(x, dtype=torch.float64)
        for name, cells in estimators.items():
            v, s = torch_twin(KL_ESTIMATORS[name].fn)(given)
            assert value(code(cells[0])[0], {"x": x}) == pytest.approx(v.item(), rel=1e-9)
            assert value(code(cells[1])[0], {"x": x}) == pytest.approx(s.item(), rel=1e-9)
            scope = {"x": x, "v": v.item(), "s": s.item(), "r": r}
            for gradient, expressions in gradients.items():
                actual = torch_twin(KL_GRADIENTS[gradient].fn)(given, v, s, r)
                for expression, y in zip(expressions, actual, strict=False):
                    assert value(code(expression)[0], scope) == pytest.approx(y.item(), rel=1e-9)


def test_bounds_of_corrections():
    rows = by_name(table(section("Corrections"), "`correction`"))
    bounds = {name: (float(low), float(high)) for name, (_, low, high, _) in rows.items()}
    assert bounds == {name: default for name, (_, default) in CORRECTIONS.items()}


def test_metrics():
    rows = table(section("Metrics"), "metric")
    assert sorted(name for cell in rows for name in code(cell)) == sorted(METRICS)


def test_the_docstring_lists_every_metric():
    listed = re.search(r"Metrics, means.*?\n\n", fastgrpo.grpo_loss.__doc__, re.DOTALL).group()
    assert set(METRICS) | set(sparse.METRICS) <= set(re.findall(r"\w+", listed))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_trainer_runs_can_be_written(trainer):
    text = section(trainer)
    rows = table(text, re.search(r"^\| (.*?) \|", text, re.M)[1])
    cells = [here for (here,) in rows.values()]
    base = eval(code(cells[0])[0])
    assert isinstance(base, LossConfig) and len(cells) > 4
    for cell in cells:
        for expression in code(cell):
            if expression.startswith("LossConfig"):
                assert isinstance(eval(expression), LossConfig)
            elif cell.startswith("+") and "=" in expression:
                fields = eval(f"dict({expression})")
                fields.pop("normalizer", None)  # the call's, not the config's
                assert isinstance(dataclasses.replace(base, **fields), LossConfig)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_runs(block, tmp_path):
    # From a file, for Triton reads the source of what it compiles.
    script = tmp_path / "block.py"
    script.write_text(block, encoding="utf-8")
    batch = make_batch()
    leaves = {"hidden": batch.hidden.requires_grad_(), "weight": batch.weight.requires_grad_()}
    with mock.patch.dict(SURROGATES):  # what a block registers is gone afterwards
        runpy.run_path(str(script), init_globals=batch._asdict() | leaves)
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all() and leaf.grad.ne(0).any()


@pytest.mark.parametrize("name", [*PAGES, "integrations.md"])
def test_links_lead_somewhere(name):
    def anchors(text: str) -> set[str]:
        titles = re.findall(r"^#+ (.*)", text, re.M)
        return {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}

    own = (DOCS / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", own):
        page, _, anchor = target.partition("#")
        assert (DOCS / page).exists(), target
        if anchor:
            text = (DOCS / page).read_text(encoding="utf-8") if page else own
            assert anchor in anchors(text), target
