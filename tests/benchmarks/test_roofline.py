"""Predictions respect the bounds, follow the formulas, and give what others have published."""

import json
import math

import pytest

from benchmarks import environment, roofline
from benchmarks.providers import LOADERS
from benchmarks.roofline import MACHINES, Case, bound, predictions
from benchmarks.shapes import CUDA_SHAPES

H100, H200 = MACHINES["h100"], MACHINES["h200"]
MODES = ("logps", "loss", "frozen", "token_logps", "half_masked", "half_zero", "skip_90", "rl")
# A clock and a memory without limits: what is left are the products.
IDEAL = H200._replace(bandwidth=math.inf, clock=math.inf)


def floor(machine, case, provider):
    """The products that a provider cannot avoid: a sparse backward has none of its own."""
    return bound(machine, case._replace(live=0.0) if provider in roofline.SPARSE else case) * 1e3


@pytest.mark.parametrize("machine", [*MACHINES.values(), roofline.cpu_machine(1e11, "test")])
@pytest.mark.parametrize("mode", MODES)
def test_no_prediction_beats_the_bound(machine, mode):
    for shape in CUDA_SHAPES:
        case = roofline.case_of(shape._asdict(), mode)
        for name, ms in predictions(machine, case).items():
            # Rows are whole ones.
            assert ms >= floor(machine, case, name) * (1 - 1e-3), (shape.label, name)


@pytest.mark.parametrize("mode", MODES)
def test_more_rows_take_longer(mode):
    for vocab, hidden in ((151936, 1024), (128256, 4096)):
        before = {}
        for rows in (1024, 2048, 4096, 8192, 16384, 65536):
            shape = {"rows": rows, "vocab": vocab, "hidden": hidden}
            now = predictions(H200, roofline.case_of(shape, mode))
            assert all(ms > before.get(name, 0.0) for name, ms in now.items())
            before = now


def test_more_kept_entries_take_longer_and_none_of_the_rest_changes():
    few, many = (predictions(H200, Case(4096, 151936, 1024, kept=kept)) for kept in (10, 300))
    for name, ms in few.items():
        assert ms < many[name] if name in roofline.SPARSE else ms == many[name]


@pytest.mark.parametrize("scored, live", [(1, 1), (1, 0.5), (0.5, 0.5), (1, 0.2), (0.2, 0.2)])
def test_skipping_follows_its_formula(scored, live):
    dense = Case(16384, 128256, 4096)
    part = dense._replace(scored=scored, live=live)
    remains = (2 * scored + 4 * live) / 6
    assert bound(H200, part) / bound(H200, dense) == pytest.approx(remains)
    # Of the route only what products do not explain may differ.
    share = roofline.anchored_route(H200, part) / roofline.anchored_route(H200, dense)
    assert share == pytest.approx(remains, rel=0.08)


def test_published_measurements():
    # QuACK 0.6.1 on an H200, 4096 x 4096 x 128256, from Liger's source: 17.33 ms.
    quack = roofline.quack(H200, Case(4096, 128256, 4096)) * 1e3
    assert quack == pytest.approx(17.33, rel=0.03)
    # TRL #7244, H100, 8192 x 4096 x 151936: plain logits 59 ms (46 bytes a logit come from it).
    large = Case(8192, 151936, 4096)
    assert roofline.plain_logits(H100, large) * 1e3 == pytest.approx(59, rel=0.06)
    # And the head's three products alone, 42 ms: where the machine's rate comes from.
    assert bound(H100, large) * 1e3 == pytest.approx(42, rel=0.02)
    # Liger's README, H100, 8192 x 4096 x 131072: scaled cross-entropy 50.39 ms, forward 12.25.
    case = Case(8192, 131072, 4096)
    assert roofline.liger_scaled(H100, case) * 1e3 == pytest.approx(50.39, rel=0.03)
    forward = roofline.liger_scaled(H100, case._replace(mode="logps")) * 1e3
    assert forward == pytest.approx(12.25, rel=0.05)


def test_products_are_what_is_left_of_every_route_on_an_ideal_machine():
    case = Case(8192, 128256, 8192)
    product = bound(IDEAL, case._replace(live=0.0))
    for name, gemms in {
        "fastgrpo triton, tiles": 3,
        "fastgrpo triton": 3,
        "fastgrpo sparse": 1,
        "plain logits": 3,
        "TRL chunked": 4,
        "Liger scaled CE": 4,
    }.items():
        assert roofline.ROUTES[name](IDEAL, case) == pytest.approx(gemms * product, rel=0.04), name


def test_a_wave_that_is_partly_filled_costs_a_whole_one():
    assert roofline.waves(128 * 132, 256, H200) == 1
    assert roofline.waves(128 * 133, 256, H200) == pytest.approx(132 * 5 / (133 * 4))  # split in 4
    assert roofline.waves(128, 256, H200) == 132 / 4


def test_efficiency_is_the_published_column():
    assert roofline.efficiency(1024) == 0.89 and roofline.efficiency(100_000) == 1
    assert roofline.efficiency(64) == pytest.approx(0.817 / 8)
    assert roofline.efficiency(1024) < roofline.efficiency(1500) < roofline.efficiency(2048)


def test_instructions_are_those_of_the_compiled_kernels():
    budget = environment.ROOT / "tests" / "kernels" / "compile" / "compile-budget.json"
    kernels = json.loads(budget.read_text())["kernels"]
    for instructions, name in (
        (roofline.STATISTICS, "anchored"),
        (roofline.EXPONENTIALS, "anchored-exps-plain"),
        (roofline.DRAW, "anchored-draw-plain"),
    ):
        assert instructions * 128 == kernels[f"{name} sm_90"]["instructions"], name


def test_routes_are_called_as_the_providers_are():
    known = {roofline.BOUND, "fastgrpo triton, tiles", "fastgrpo sparse, tiles"}
    assert set(roofline.ROUTES) | set(roofline.CPU_ROUTES) <= set(LOADERS) | known


def test_records_stand_beside_their_predictions(capsys):
    record = roofline.newest_speed("cpu")
    machine = roofline.machine_of(record)
    text = roofline.measured_table(machine, record)
    modelled = [row for row in record["speed"] if row["provider"] in roofline.CPU_ROUTES]
    timed = [row for row in modelled if row["provider"] != roofline.BOUND and "median_ms" in row]
    assert len(text.splitlines()) == 2 + len(timed) and "fastgrpo torch" in text
    roofline.main(["--device", "h100", "--rows", "4096", "--mode", "loss"])
    printed = capsys.readouterr().out
    assert "predicted" in printed and "TRL #7244" in printed
