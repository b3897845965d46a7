"""examples/dimension.py: its estimators are right, and the measurement agrees with the theory."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "dimension.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dimension_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def quick(script, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("dimension")
    script.main(["--output-dir", str(folder), "--quick"])
    assert (folder / "dimension.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "dimension.json").read_text())


@pytest.mark.slow
def test_exponents_are_those_of_theory(script, quick) -> None:
    expected = {
        ("variance", "fixed", "parameters"): 1,
        ("variance", "growing", "parameters"): 1,
        ("progress", "growing", "parameters"): -1,
    }
    assert len(quick["curves"]) == 8
    for curve in quick["curves"]:
        key = curve["quantity"], curve["scaling"], curve["method"]
        low, high = curve["interval_95"]
        # Twice the interval's reach: it is one of eight, from a quick run.
        reach = 2 * max(high - low, 0.01)
        assert abs(curve["exponent"] - expected.get(key, 0)) < reach < 1, key


def test_measured_variance_is_that_of_theory(quick) -> None:
    for curve in quick["curves"]:
        if curve["quantity"] == "variance":
            for mean, error, theory in zip(
                curve["mean"], curve["standard_error"], curve["theory"], strict=True
            ):
                assert abs(mean - theory) < 4.5 * error + 0.01 * theory


def test_the_answer_is_marked_as_extrapolation_and_cites(script, quick) -> None:
    answer = script.answer(quick)
    assert "EXTRAPOLATION" in answer and "70M" in answer and "175B" in answer
    for number in ("2305.17333", "2509.24372", "2511.16652", "2012.13255", "1703.03864"):
        assert f"arXiv\n{number}" in answer or f"arXiv {number}" in answer


@pytest.mark.slow
@pytest.mark.parametrize("prompts,width", [(1, 1), (1, 7), (5, 1)], ids=["20", "wide", "prompts"])
@pytest.mark.parametrize("method", ["parameters", "tokens"])
def test_estimates_point_along_the_gradient(script, method: str, prompts: int, width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    estimates = script.estimate(method, prompts, width, 3000, draw)
    mean, error = estimates.along.mean(), estimates.along.std() / 3000**0.5
    # Over parameters it is the gradient of the smoothed loss, a few percent beside.
    assert abs(mean - estimates.gradient_square) < 4.5 * error + 0.05 * estimates.gradient_square
    assert estimates.gradient_square > 5 * error


def test_the_expected_loss_is_that_of_the_sentences(script) -> None:
    draw = torch.Generator().manual_seed(0)
    u = torch.randn(20, generator=draw) - 1
    losses = script.LOSSES[script.write(u.expand(100_000, -1), draw)]
    error = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() - script.expected_loss(u)) < 4.5 * error


def test_the_score_function_is_the_derivative_of_the_log_probability(script) -> None:
    for letters in (0, 3, 19, 20):
        u = script.START.clone().requires_grad_()
        stop, go = torch.nn.functional.logsigmoid(u), torch.nn.functional.logsigmoid(-u)
        log_pi = go[:letters].sum() + stop[letters : letters + 1].sum()
        (expected,) = torch.autograd.grad(log_pi, u)
        actual = script.score_function(torch.tensor(letters))
        torch.testing.assert_close(actual, expected)
