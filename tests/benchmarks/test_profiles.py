"""Statistics of rows are right, batches have the recorded rows, a tiny model gets its record."""

import json
import math
import string

import pytest
import torch

from benchmarks import profile_model
from benchmarks.data import CLIPPED, profile_batch
from benchmarks.measure import MODES
from benchmarks.profiles import (
    MASS_RANKS,
    TAUS,
    TOP_P,
    Profile,
    curve_ranks,
    expected_kept,
    newest_profile,
    newest_record,
    row_statistics,
)
from benchmarks.shapes import Shape
from benchmarks.time_model import routes
from fastgrpo.train.arithmetic import character_tokenizer, tiny_model

POLICIES = sorted({mode.policy for mode in MODES.values()} - {None})


def test_statistics_against_a_direct_computation():
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(5, 16, generator=generator)
    weight = torch.randn(300, 16, generator=generator)
    stats = row_statistics(hidden, weight, scale=1.5)
    for i, p in enumerate((1.5 * hidden.double() @ weight.double().T).softmax(-1)):
        ordered = p.sort(descending=True).values
        assert stats.entropy[i].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)
        for j, rank in enumerate(MASS_RANKS):
            assert stats.mass[i, j].item() == pytest.approx(ordered[:rank].sum().item(), rel=1e-4)
        for j, tau in enumerate(TAUS):
            kept = sum(min(1.0, q / tau) for q in p.tolist())
            assert stats.kept[i, j].item() == pytest.approx(kept, rel=1e-4)
        smallest = next(k for k in range(1, 301) if ordered[:k].sum() >= TOP_P)
        assert stats.nucleus[i] == smallest
        for j, rank in enumerate(curve_ranks(300)):
            expected = ordered[rank - 1].log().item()
            assert stats.curve[i, j].item() == pytest.approx(expected, abs=1e-4)
    kept = expected_kept(1.5 * hidden, weight)
    assert kept == pytest.approx(stats.kept[:, TAUS.index(1e-3)].mean().item())


def test_a_nucleus_has_no_more_than_top_k_entries():
    stats = row_statistics(torch.zeros(1, 4), torch.zeros(2000, 4))
    assert stats.nucleus.item() == 512


def test_curves_are_recorded_from_the_first_rank_to_the_last():
    ranks = curve_ranks(49152)
    assert ranks[:16] == list(range(1, 17)) and ranks[-1] == 49152
    assert all(low < high <= 1.4 * low for low, high in zip(ranks[15:], ranks[16:], strict=False))
    assert curve_ranks(5) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("vocab", [300, 4096, 20000])
def test_a_power_law_is_itself_in_any_vocabulary(vocab):
    ranks, exponent = curve_ranks(4096), 1.3
    recorded = -exponent * torch.tensor(ranks).double().log()
    extended = Profile(recorded[None], ranks, "").extended(vocab)
    expected = (-exponent * torch.arange(1, vocab + 1).double().log()).log_softmax(-1)
    assert torch.allclose(extended, expected[None], atol=1e-9)


@pytest.mark.parametrize(
    "policy, shape",
    [(policy, Shape("own", 128, 49152, 128)) for policy in POLICIES]
    + [(policy, Shape("small", 256, 8192, 160)) for policy in POLICIES]
    + [("temperature 1", Shape("large", 128, 80_000, 128))],
)
def test_batch_has_the_rows_of_the_profile(policy, shape):
    batch = profile_batch(shape, torch.float32, profile=newest_profile(policy))
    rows, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
    stats = row_statistics(rows, weight)
    measured = {p["name"]: p for p in newest_record()[1]["policies"]}[policy]
    kept = stats.kept[:, TAUS.index(1e-3)]
    expected = measured["kept"]["0.001"]
    assert kept.mean().item() == pytest.approx(expected["mean"], rel=0.15)
    assert kept.median().item() == pytest.approx(expected["p50"], rel=0.15)
    # The recorded rows are typical ones: of rows as certain, none keeps especially many or few.
    assert kept.quantile(0.9).item() == pytest.approx(expected["p90"], rel=0.2)
    assert 1 / 1.5 < kept.quantile(0.1).item() / expected["p10"] < 1.5
    deciles = stats.entropy.quantile(torch.arange(1, 10) / 10).tolist()
    # The least certain fraction of a nat is nobody's concern.
    assert deciles == pytest.approx(measured["entropy"]["deciles"], rel=0.15, abs=0.05)
    assert stats.entropy.mean().item() == pytest.approx(measured["entropy"]["mean"], rel=0.1)


def test_tokens_are_drawn_from_their_rows():
    batch = profile_batch(
        Shape("test", 2048, 1031, 48), torch.float32, profile=newest_profile("temperature 1")
    )
    logps = torch.log_softmax(batch.hidden.detach() @ batch.weight.detach().T, -1)
    taken = logps.gather(-1, batch.completion_ids[..., None]).mean().item()
    entropy = -(logps.exp() * logps).sum(-1).mean().item()
    assert -taken == pytest.approx(entropy, abs=0.15)  # five standard deviations


@pytest.mark.parametrize("clipped", [0.0, CLIPPED, 0.25])
def test_the_stated_share_of_tokens_is_clipped(clipped):
    shape = Shape("test", 400, 1031, 48)
    batch = profile_batch(
        shape, torch.float32, profile=newest_profile("temperature 1"), clipped=clipped
    )
    logps = torch.log_softmax(batch.hidden.detach() @ batch.weight.detach().T, -1)
    change = logps.gather(-1, batch.completion_ids[..., None])[..., 0] - batch.old_logps
    signs = batch.advantages.sign()[:, None].expand_as(change)
    found = profile_model.clipping(change.flatten(), signs.flatten())
    assert found["clipped"] == found["outside"] == clipped


def test_defaults_are_the_profile_s():
    record = newest_record()[1]
    (policy,) = (p for p in record["policies"] if p["temperature"] == 1)
    assert routes.KEPT == pytest.approx(policy["kept"]["0.001"]["mean"], rel=0.02)
    (update,) = (u for u in record["one_update"]["updates"] if u["learning_rate"] == 1e-5)
    assert pytest.approx(update["same_tokens"]["clipped"], abs=5e-3) == CLIPPED


def test_only_a_ratio_that_moved_with_its_advantage_is_clipped():
    change = torch.tensor([1.25, 1.25, 0.75, 0.75, 1.1, 1.25]).log()
    found = profile_model.clipping(change, torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0]))
    assert found["clipped"] == pytest.approx(2 / 6, abs=1e-4)
    assert found["outside"] == pytest.approx(5 / 6, abs=1e-4)
    assert found["log_ratio"]["max"] == pytest.approx(-math.log(0.75), abs=1e-4)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    tokenizer = character_tokenizer(string.printable)
    torch.manual_seed(0)
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"question": f"What is {a} + 1?", "answer": f"#### {a + 1}"} for a in range(6)]
    (folder / "maths.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = profile_model.main(
        [
            *(str(folder / "model"), "--prompts", str(folder / "maths.jsonl"), "--origin", "made"),
            *"--temperatures 1 0.5 --rates 3e-2 0 --completions 4 --groups 2 --group 4".split(),
            *("--tokens", "8", "--curves", "5", "--output", str(folder / "profile-tiny.json")),
        ]
    )
    return json.loads(path.read_text()), folder


def test_record_of_a_tiny_model(tiny_run):
    record, folder = tiny_run
    assert {"device", "date", "commit", "versions", "command", "seconds"} <= set(record)
    vocab = record["model"]["vocab"]
    assert record["model"]["name"] == "model" and len(record["model"]["sha256"]) == 1
    warm, cold = record["policies"]
    assert (warm["name"], cold["name"]) == ("temperature 1", "temperature 0.5")
    assert cold["entropy"]["mean"] < warm["entropy"]["mean"] < math.log(vocab)
    for policy in record["policies"]:
        assert 4 <= policy["rows"] <= 32 and len(policy["entropy"]["deciles"]) == 9
        assert sum(band["share"] for band in policy["bands"]) == pytest.approx(1, abs=1e-3)
        assert policy["ranks"] == curve_ranks(vocab)
        curves = newest_profile(policy["name"], folder).extended(vocab)
        entropies = -(curves.exp() * curves).sum(1)
        assert len(entropies) == 5 and entropies[0] < entropies[4]
        # The middles of five parts of the rows, and interpolated.
        assert entropies.mean().item() == pytest.approx(policy["entropy"]["mean"], rel=0.05)
    profile = newest_profile("temperature 0.5", folder)
    assert profile.source == "profile-tiny.json, temperature 0.5"
    assert profile.curves.tolist() == torch.tensor(cold["curves"]).tolist()
    with pytest.raises(FileNotFoundError, match="benchmarks.profile_model"):
        newest_profile("temperature 1", folder / "model")


def test_only_an_update_moves_ratios_and_it_starts_from_the_same_weights(tiny_run):
    moved, still = tiny_run[0]["one_update"]["updates"]
    assert (moved["learning_rate"], still["learning_rate"]) == (0.03, 0.0)
    for tokens in ("same_tokens", "other_tokens"):
        assert still[tokens]["log_ratio"]["max"] < 1e-5
        assert moved[tokens]["outside"] > 0.1
    assert moved["same_tokens"]["clipped"] > 0
