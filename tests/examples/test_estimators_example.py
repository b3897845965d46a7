"""examples/estimators.py: its files, its counts, and that its estimators learn."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "estimators.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("estimators_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


@pytest.mark.slow
def test_a_quick_run_leaves_figure_data_and_table(script, tmp_path, capsys, monkeypatch) -> None:
    # In this process: a pool's processes would import this module by a name that they lack.
    monkeypatch.setattr(
        script, "run_all", lambda jobs, settings, _: [script.learn(*job, settings) for job in jobs]
    )
    script.main(["--output-dir", str(tmp_path), "--quick"])
    assert (tmp_path / "estimators.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "estimators.json").read_text())
    assert result["sentences"] == [0, 128, 256, 384, 512]
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[1:]] == list(script.METHODS)
    for method, record in result["methods"].items():
        assert len(record["losses"]) == 2 and {len(c) for c in record["losses"]} == {5}
        best = min(record["tried"], key=lambda tried: tried["final_loss"])
        assert record["learning_rate"] == best["learning_rate"], method
    # All start from the same networks.
    assert len({tuple(c[0] for c in r["losses"]) for r in result["methods"].values()}) == 1


@pytest.mark.parametrize("method", range(5))
def test_every_update_writes_as_many_sentences(script, monkeypatch, method: int) -> None:
    written = []

    def counted(step, prompts):
        ids, mask = write(step, prompts)
        written.append(len(ids))
        return ids, mask

    write = script.write
    monkeypatch.setattr(script, "write", counted)
    torch.manual_seed(0)
    model = script.Writer()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        list(script.METHODS.values())[method](model, optimizer, 0.1)
    assert written == [script.BATCH] * 3


@pytest.mark.slow
@pytest.mark.parametrize("method", range(5))
def test_every_method_learns(script, method: int) -> None:
    """A tenth of the full run takes the loss to less than half of what it was.

    Of three seeds the middle one: reusing a batch can overshoot, and the rounding of a processor
    decides for which seed it does.
    """
    settings = script.Settings(sentences=1920, evaluations=3)
    name, rate = list(script.METHODS)[method], 0.03 if method == 0 else 0.01
    curves = [script.learn(name, rate, 0.3, seed, settings) for seed in range(3)]
    assert statistics.median(curve[-1] / curve[0] for curve in curves) < 0.5


def test_sentences_are_counted_without_their_end(script) -> None:
    ids = torch.tensor([[1, 2, script.END, 5], [3, 3, 3, 3], [script.END, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    assert script.losses(ids, mask).tolist() == [64.0, 36.0, 100.0]


def test_a_model_per_sentence_writes_what_each_alone_would(script) -> None:
    """vmap over perturbed parameters against the models one by one, on the same state."""
    torch.manual_seed(0)
    model = script.Writer()
    theta = {k: p + 0.3 * torch.randn(6, *p.shape) for k, p in model.named_parameters()}
    token, state = torch.arange(6), torch.randn(6, script.HIDDEN)
    call = script.functional_call
    states, logits = script.vmap(lambda p, t, s: call(model, p, (t, s)))(theta, token, state)
    for i in range(6):
        alone = call(model, {k: p[i] for k, p in theta.items()}, (token[i], state[i]))
        torch.testing.assert_close(states[i], alone[0])
        torch.testing.assert_close(logits[i], alone[1])
