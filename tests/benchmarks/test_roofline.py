"""Predictions respect the bounds and follow the formulas; the steps give what others published."""

import json
import math

import pytest

from benchmarks import environment
from benchmarks.providers import LOADERS
from benchmarks.shapes import CUDA_SHAPES
from benchmarks.time_model import machines, roofline, routes
from benchmarks.time_model.machines import MACHINES, cpu_machine, gemm
from benchmarks.time_model.roofline import predictions
from benchmarks.time_model.routes import Case, backward_products, bound, case_of, forward

H100, H200 = MACHINES["h100"], MACHINES["h200"]
MODES = ("logps", "loss", "frozen", "token_logps", "half_masked", "half_zero", "skip_90", "rl")
# A clock and a memory without limits: what is left are the products.
IDEAL = H200._replace(bandwidth=math.inf, clock=math.inf)


def floor(machine, case, provider):
    """The products that a provider cannot avoid: a sparse backward has none of its own."""
    return bound(machine, case._replace(live=0.0) if provider in routes.SPARSE else case) * 1e3


@pytest.mark.parametrize("machine", [*MACHINES.values(), cpu_machine(1e11, "test")])
@pytest.mark.parametrize("mode", MODES)
def test_no_prediction_beats_the_bound(machine, mode):
    for shape in CUDA_SHAPES:
        case = case_of(shape._asdict(), mode)
        for name, ms in predictions(machine, case).items():
            # Rows are whole ones.
            assert ms >= floor(machine, case, name) * (1 - 1e-3), (shape.label, name)


@pytest.mark.parametrize("mode", MODES)
def test_more_rows_take_longer(mode):
    for vocab, hidden in ((151936, 1024), (128256, 4096)):
        before = {}
        for rows in (1024, 2048, 4096, 8192, 16384, 65536):
            shape = {"rows": rows, "vocab": vocab, "hidden": hidden}
            now = predictions(H200, case_of(shape, mode))
            assert all(ms > before.get(name, 0.0) for name, ms in now.items())
            before = now


def test_more_kept_entries_take_longer_and_none_of_the_rest_changes():
    few, many = (predictions(H200, Case(4096, 151936, 1024, kept=kept)) for kept in (10, 300))
    for name, ms in few.items():
        assert ms < many[name] if name in routes.SPARSE else ms == many[name]


@pytest.mark.parametrize("scored, live", [(1, 1), (1, 0.5), (0.5, 0.5), (1, 0.2), (0.2, 0.2)])
def test_skipping_follows_its_formula(scored, live):
    dense = Case(16384, 128256, 4096)
    part = dense._replace(scored=scored, live=live)
    remains = (2 * scored + 4 * live) / 6
    assert bound(H200, part) / bound(H200, dense) == pytest.approx(remains)
    # Of the route only what products do not explain may differ.
    share = routes.anchored_route(H200, part) / routes.anchored_route(H200, dense)
    assert share == pytest.approx(remains, rel=0.08)


def quack(machine, case):
    """QuACK's linear cross-entropy, 6NVH, a scalar loss: one pass over 16-bit logits, 4 bytes."""
    n = case.rows
    logits = gemm(machine, n, case.vocab, case.hidden) + 4 * n * case.vocab / machine.bandwidth
    return logits + backward_products(machine, case, n, 4096)


def liger_scaled(machine, case):
    """Liger's scaled cross-entropy: 8NVH in fused kernels, waves of 1024 rows in the backward."""
    # What a wave adds to dweight is added by the memory system, under the products.
    dhidden = gemm(machine, case.rows, case.hidden, case.vocab)
    dweight = gemm(machine, case.vocab, case.hidden, case.rows, piece=1024)
    return 2 * forward(machine, case) + dhidden + dweight


def test_published_measurements():
    """The steps that our predictions are made of, put together as others call them."""
    # QuACK 0.6.1 on an H200, 4096 x 4096 x 128256, from Liger's source: 17.33 ms.
    assert quack(H200, Case(4096, 128256, 4096)) * 1e3 == pytest.approx(17.33, rel=0.03)
    # TRL #7244, H100, 8192 x 4096 x 151936: the head's three products alone take 42 ms. The
    # machine's rate comes from them.
    assert bound(H100, Case(8192, 151936, 4096)) * 1e3 == pytest.approx(42, rel=0.02)
    # Liger's README, H100, 8192 x 4096 x 131072: scaled cross-entropy 50.39 ms, forward 12.25.
    case = Case(8192, 131072, 4096)
    assert liger_scaled(H100, case) * 1e3 == pytest.approx(50.39, rel=0.03)
    assert forward(H100, case) * 1e3 == pytest.approx(12.25, rel=0.05)


def test_products_are_what_is_left_of_every_route_on_an_ideal_machine():
    case = Case(8192, 128256, 8192)
    product = bound(IDEAL, case._replace(live=0.0))
    for name, gemms in {
        "fastgrpo triton, tiles": 3,
        "fastgrpo triton": 3,
        "fastgrpo sparse": 1,
    }.items():
        assert routes.ROUTES[name](IDEAL, case) == pytest.approx(gemms * product, rel=0.04), name


def test_a_wave_that_is_partly_filled_costs_a_whole_one():
    assert machines.waves(128 * 132, 256, H200) == 1
    assert machines.waves(128 * 133, 256, H200) == pytest.approx(132 * 5 / (133 * 4))  # split in 4
    assert machines.waves(128, 256, H200) == 132 / 4


def test_efficiency_is_the_published_column():
    assert machines.efficiency(1024) == 0.89 and machines.efficiency(100_000) == 1
    assert machines.efficiency(64) == pytest.approx(0.817 / 8)
    assert machines.efficiency(1024) < machines.efficiency(1500) < machines.efficiency(2048)


def test_instructions_are_those_of_the_compiled_kernels():
    budget = environment.ROOT / "tests" / "kernels" / "compile" / "compile-budget.json"
    kernels = json.loads(budget.read_text())["kernels"]
    for instructions, name in (
        (routes.STATISTICS, "anchored"),
        (routes.EXPONENTIALS, "anchored-exps-plain"),
        (routes.DRAW, "anchored-draw-plain"),
    ):
        assert instructions * 128 == kernels[f"{name} sm_90"]["instructions"], name


def test_routes_are_called_as_the_providers_are():
    known = {routes.BOUND, "fastgrpo triton, tiles", "fastgrpo sparse, tiles"}
    assert set(routes.ROUTES) | set(routes.CPU_ROUTES) <= set(LOADERS) | known


def test_records_stand_beside_their_predictions(capsys):
    record = roofline.newest_speed("cpu")
    machine = roofline.machine_of(record)
    text = roofline.measured_table(machine, record)
    modelled = [row for row in record["speed"] if row["provider"] in routes.CPU_ROUTES]
    timed = [row for row in modelled if row["provider"] != routes.BOUND and "median_ms" in row]
    assert len(text.splitlines()) == 2 + len(timed) and "fastgrpo torch" in text
    roofline.main(["--device", "h100", "--rows", "4096", "--mode", "loss"])
    printed = capsys.readouterr().out
    assert "predicted" in printed and "TRL #7244" in printed
