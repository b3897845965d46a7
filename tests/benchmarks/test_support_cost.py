"""What a support costs: the drawn ids follow their profiles, and a record fills the tables."""

from __future__ import annotations

import json
import re

import pytest
import torch

from benchmarks import environment, support_cost, tables
from benchmarks.shapes import Shape
from benchmarks.supports import PROFILES, draw_support
from benchmarks.time_model import routes
from benchmarks.time_model.machines import MACHINES

SHAPE = Shape("test", 48, 700, 32)
# What was measured beside the mean and the share of tokens with one id.
MEDIANS = {"8": 2, "12": 5}


@pytest.mark.parametrize("name", PROFILES)
def test_the_numbers_of_ids_follow_their_profile(name):
    profile, counts = PROFILES[name], PROFILES[name].counts(2048)
    assert counts.double().mean().item() == pytest.approx(profile.mean, rel=1e-3)
    assert (counts == 1).double().mean().item() == pytest.approx(profile.alone, abs=1e-3)
    if name in MEDIANS:
        assert counts.median() == MEDIANS[name]


def test_a_drawn_support_has_the_token_and_so_many_ids_in_all():
    ids, counts = torch.randint(50, (3, 4)), torch.arange(1, 13)
    support = draw_support(ids, counts, 50)  # which refuses an id that comes twice
    assert support.shape == (3, 4) and torch.equal(support.counts.flatten(), counts)
    firsts = support.ids[support.cu[:-1]]
    assert torch.equal(firsts, ids.flatten()) and support.ids.max() < 50


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "support-test.json"
    patch = pytest.MonkeyPatch()
    patch.setattr(support_cost, "TINY_SHAPES", (SHAPE,))
    patch.setattr(support_cost.cases, "memory", _peak_of_seven_mib)
    support_cost.main(["--rehearse", "--rounds", "2", "--output", str(path)])
    patch.undo()
    return path


def _peak_of_seven_mib(who, shape, dtype, mode, *, timeout):
    return [{"shape": shape._asdict(), "mode": mode, "peak_mib": 7.0}]


def test_a_record_has_every_profile_and_both_ways(record):
    content = json.loads(record.read_text())
    assert {"device", "commit", "versions", "profiles", "load_average"} <= set(content)
    assert not any("failure" in row for row in content["accuracy"])
    names = {row["name"] for row in content["times"]}
    assert names == {"dense", "masked logits", *support_cost.SUPPORT_MODES}
    assert all(len(row["samples_ms"]) == 2 for row in content["times"])
    ways = {(row["ids"], row["name"]) for row in content["curve"]}
    assert len(ways) == 3 * len({ids for ids, _ in ways})


def test_tables_come_from_the_newest_record(record):
    marked = (
        "<!-- table:support -->\n<!-- /table -->\n<!-- table:support-curve -->\n<!-- /table -->"
    )
    filled = tables.fill(marked, record.parent)
    assert re.search(r"48 x 700 x 32 \| 12 / \d+ / 21% \| .* \| 7 \|", filled)
    assert "(V / 32)" in filled and filled.count("record [support-test.json]") == 2
    assert tables.newest("cpu", record.parent) is None, "a record of supports is none of peers"
    assert "No record yet." in tables.fill(marked, environment.ROOT / "tests")


def test_a_support_is_bounded_by_what_it_fetches():
    machine, few = MACHINES["h200"], routes.Case(16384, 151936, 1024, kept=12)
    many = few._replace(kept=120)
    dense = 2 * few.vocab * few.hidden / machine.bandwidth
    times = [routes.support_route(machine, case) - dense for case in (few, many)]
    fetched = 3 * 12 * few.rows * 2 * few.hidden / machine.bandwidth
    assert fetched < times[0] < 1.1 * fetched and times[1] == pytest.approx(10 * times[0])
    assert routes.support_route(machine, few) < 0.05 * routes.anchored_route(machine, few)
