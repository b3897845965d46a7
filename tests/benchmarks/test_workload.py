"""Row statistics are right, batches have the given rows, and a tiny run writes its report."""

import json
import math

import pytest
import torch

from benchmarks.measure import MODES
from benchmarks.shapes import Shape
from benchmarks.time_model import profiles, workload
from benchmarks.time_model.profiles import LARGER_VOCABS, RANKS, TAUS


def test_statistics_against_a_direct_computation():
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(5, 16, generator=generator)
    weight = torch.randn(300, 16, generator=generator)
    stats = profiles.row_statistics(hidden, weight, scale=1.5)
    for i, p in enumerate((1.5 * hidden.double() @ weight.double().T).softmax(-1)):
        ordered = p.sort(descending=True).values
        assert stats.entropy[i].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)
        for j, rank in enumerate(RANKS):
            assert stats.mass[i, j].item() == pytest.approx(ordered[:rank].sum().item(), rel=1e-4)
        for j, tau in enumerate(TAUS):
            kept = sum(min(1.0, q / tau) for q in p.tolist())
            assert stats.kept[i, j].item() == pytest.approx(kept, rel=1e-4)
    assert profiles.expected_kept(1.5 * hidden, weight) == pytest.approx(
        stats.kept[:, 1].mean().item()
    )


def test_larger_vocabulary_continues_the_power_law():
    vocab, exponent = 4096, 1.3
    weights = torch.arange(1, LARGER_VOCABS[-1] + 1).double() ** -exponent
    row = (weights[:vocab] / weights[:vocab].sum()).float()
    stats = profiles.row_statistics(row.log()[None], torch.eye(vocab))
    for j, larger in enumerate(LARGER_VOCABS):
        p = weights[:larger] / weights[:larger].sum()
        for i, tau in enumerate(TAUS):
            kept = (p / tau).clamp(max=1).sum().item()
            assert stats.kept_larger[0, j, i].item() == pytest.approx(kept, rel=2e-3)


def test_steep_rows_have_nothing_behind_them():
    row = torch.full((1, 4096), -200.0)
    row[0, 7] = 0.0
    stats = profiles.row_statistics(row, torch.eye(4096))
    assert stats.kept.tolist() == stats.kept_larger[:, 0].tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("policy", sorted({m.policy for m in MODES.values()} - {None}))
def test_batch_keeps_as_many_entries_as_the_profile(policy):
    profile = profiles.newest_profile(policy)
    shape = Shape("test", 128, 8192, 512)
    batch = profiles.rl_like_batch(shape, torch.float32, profile=profile)
    stats = profiles.row_statistics(batch.hidden.detach().flatten(0, 1), batch.weight.detach())
    _, record = profiles.newest_workload()
    measured = {p["name"]: p for p in record["policies"]}[policy]
    kept, entropy = measured["kept"]["0.001"]["mean"], measured["entropy"]["mean"]
    assert stats.kept[:, 1].mean().item() == pytest.approx(kept, rel=0.3)
    assert stats.entropy.mean().item() == pytest.approx(entropy, rel=0.3)
    # Tokens are drawn from the rows: on average they are as unlikely as the entropy says.
    logps = torch.log_softmax(batch.hidden.detach() @ batch.weight.detach().T, -1)
    taken = logps.gather(-1, batch.completion_ids[..., None])
    assert -taken.mean().item() == pytest.approx(stats.entropy.mean().item(), abs=0.8)


def test_peaks_have_the_masses_of_their_ranks():
    mass = torch.tensor([[0.5, 0.75, 0.85, 0.93] + [1.0] * (len(RANKS) - 4)]).double()
    p = profiles._peak_probabilities(mass, 8)
    assert p[0].tolist() == pytest.approx([0.5, 0.25, 0.05, 0.05, 0.02, 0.02, 0.02, 0.02])


def test_sampled_denominator_is_the_exact_one_in_the_mean():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8), torch.randn(400, 8) / 3
    ids = torch.randint(400, (6,))
    exact = workload.cross_entropy(hidden, weight, ids, None)
    assert workload.cross_entropy(hidden, weight, ids, 400) == exact
    drawn = [workload.cross_entropy(hidden, weight, ids, 200).item() for _ in range(200)]
    assert sum(drawn) / 200 == pytest.approx(exact.item(), abs=0.02)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workload")
    rows = [{"question": f"What is {a} + 1?", "answer": f"It is {a + 1}."} for a in range(60)]
    maths = folder / "maths.jsonl"
    maths.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = "--hidden 32 --layers 1 --vocab 512 --seconds 2 --megabytes 0.05 --length 16"
    arguments += " --completions 4 --tokens 8 --sharpness 1 3 --sampled 64"
    arguments += f" --maths {maths} --cache {folder / 'cache'} --output "
    first = workload.main([*arguments.split(), str(folder / "workload-a.json")])
    again = workload.main([*arguments.split(), str(folder / "workload-b.json")])
    return json.loads(first.read_text()), json.loads(again.read_text()), folder


def test_record_of_a_tiny_run(tiny_run):
    record, _, folder = tiny_run
    assert {"device", "date", "commit", "versions", "command", "seconds"} <= set(record)
    assert record["model"]["hidden"] == 32 and record["model"]["vocab"] <= 512
    assert record["text"]["maths_examples"] == 54
    assert record["training"]["tokens"] == record["training"]["steps"] * 8 * 16
    assert 0 < record["training"]["final_loss"] < 2 * math.log(512)
    plain, sharp = record["policies"]
    assert (plain["name"], sharp["name"]) == ("as trained", "sharpened 3")
    assert sharp["entropy"]["mean"] < plain["entropy"]["mean"]
    for policy in record["policies"]:
        assert policy["share"] == 1 and len(policy["entropy"]["deciles"]) == 9
        assert sum(band["share"] for band in policy["bands"]) == pytest.approx(1, abs=1e-3)
        for part in (policy, *policy["bands"]):
            assert set(part["tail_mass"]) == {"16", "64", "256"}
            assert set(part["kept"]) == {"0.0001", "0.001", "0.01"}
            assert set(part["kept_extrapolated"]) == {str(v) for v in LARGER_VOCABS}
            assert set(part["kept"]["0.01"]) == {"mean", "p50", "p90", "p99", "max"}
        assert all(len(row) == len(RANKS) for row in policy["mass_rows"])
    assert profiles.newest_profile("sharpened 3", folder).source.startswith("workload-")
    with pytest.raises(FileNotFoundError, match="benchmarks.time_model.workload"):
        profiles.newest_profile("as trained", folder / "cache")


def test_cached_model_gives_the_same_rows(tiny_run):
    record, again, _ = tiny_run
    assert again["policies"] == record["policies"] and again["training"] == record["training"]
