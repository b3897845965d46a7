"""Rows 1 to 7 of the fault matrix: which tokens there are, and which ids they have."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig, checks
from fastgrpo.testing import Batch, make_batch
from loss_routes import LOSSES, ROUTES, assert_same, routes, run

FOREIGN = {(0, 0): 53, (0, 1): 63, (0, 3): 64, (1, 0): -1, (1, 1): 10**12}
SMALL = dict(sequences=3, length=4, hidden_size=16)


@pytest.mark.parametrize("sequences, length", [(0, 5), (3, 0), (0, 0)])
@routes()
def test_row_01_no_tokens(backend, route, sequences, length):
    batch = make_batch(**SMALL)
    none = Batch(
        batch.hidden.new_zeros(sequences, length, 16),
        batch.weight,
        torch.zeros(sequences, length, dtype=torch.int64),
        torch.zeros(sequences, length, dtype=torch.bool),
        torch.zeros(sequences),
        *(torch.zeros(sequences, length) for _ in range(3)),
    )
    out = run(route, none, backend=backend)
    assert out.value == 0 and out.logps.shape == (sequences, length)
    assert out.dhidden.shape == none.hidden.shape and (out.dweight == 0).all()


@routes()
def test_row_02_every_token_masked(backend, route):
    """Whatever they hold, there is a loss of 0 with gradients of 0."""
    batch = make_batch(**SMALL)
    batch.hidden[:] = torch.inf
    batch.old_logps[:] = torch.nan
    nothing = batch._replace(completion_mask=torch.zeros_like(batch.completion_mask))
    out = run(route, nothing, backend=backend)
    assert all((x == 0).all() for x in out)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@routes(of=LOSSES, without=("sparse", "support"))
def test_row_03_an_empty_sequence(backend, route, packed):
    """It counts as one of the sequences, and adds nothing: no 0 / 0."""
    batch = make_batch(**SMALL | {"sequences": 2})
    empty = make_batch(**SMALL | {"sequences": 1}, seed=1)
    both = Batch(
        *(x if name == "weight" else torch.cat([x, getattr(empty, name)])
          for name, x in batch._asdict().items())
    )  # fmt: skip
    both.completion_mask[2] = False
    alone = run(route, batch, backend=backend, normalizer=3.0)
    if packed:
        keep = torch.tensor([True, True, False])
        flat = {
            name: x if name in ("weight", "advantages") else x[keep].flatten(0, 1)
            for name, x in both._asdict().items()
        }
        cu = torch.tensor([0, 4, 4, 8], dtype=torch.int32)
        both = Batch(**flat)._replace(advantages=both.advantages[[0, 2, 1]])
        out = run(route, both, backend=backend, cu_seqlens=cu)
        out = out._replace(logps=out.logps.view(2, 4), dhidden=out.dhidden.view(2, 4, -1))
    else:
        out = run(route, both, backend=backend)
        assert (out.logps[2] == 0).all() and (out.dhidden[2] == 0).all()
        out = out._replace(logps=out.logps[:2], dhidden=out.dhidden[:2])
    if "frozen" in route:
        out = out._replace(dweight=out.dhidden)
    assert_same(out, alone)


COUNTS = {
    "token_mean": lambda mask: mask.sum(),
    "sequence_mean": lambda mask: len(mask),
    "sequence_sum": lambda mask: len(mask),
    "fixed_length": lambda mask: len(mask) * 9,
}


@pytest.mark.parametrize("aggregation", COUNTS)
def test_row_04_one_mask_in_numerator_and_denominator(backend, aggregation):
    """Holes as after calls of a tool: a batch without these tokens has the same loss."""
    batch = make_batch(sequences=2)
    holes = torch.ones(2, 7, dtype=torch.bool)
    holes[0, [1, 4]] = holes[1, 5:] = False
    length = {"max_completion_length": 9} if aggregation == "fixed_length" else {}
    config = LossConfig(aggregation=aggregation, beta=0.1, **length)

    def loss(batch, **given):
        out = fastgrpo.grpo_loss(
            *batch[:5], old_logps=batch.old_logps, ref_logps=batch.ref_logps, config=config,
            backend=backend, **given,
        )  # fmt: skip
        return out.loss, out.metrics

    kept = Batch(
        *(x if name in ("weight", "advantages") else x[holes]
          for name, x in batch._asdict().items())
    )  # fmt: skip
    wanted, metrics = loss(kept, cu_seqlens=torch.tensor([0, 5, 10], dtype=torch.int32))
    actual, seen = loss(batch._replace(completion_mask=holes))
    assert actual == pytest.approx(wanted.item(), rel=1e-6)
    assert seen.keys() == metrics.keys() and seen["live_rows_count"] == holes.sum()
    for name, value in metrics.items():
        assert seen[name] == pytest.approx(value.item(), rel=1e-5, nan_ok=True), name
    counted = loss(
        batch._replace(completion_mask=holes), normalizer=float(COUNTS[aggregation](holes))
    )[0]
    assert counted == pytest.approx(wanted.item(), rel=1e-6)


@routes()
def test_row_05_ids_that_are_ignored(backend, route):
    """Their ids, hidden states and log-probs are not looked at."""
    batch = make_batch(**SMALL)
    mask = batch.completion_mask
    clean = run(route, batch, backend=backend)
    spoiled = Batch(*(x.clone() for x in batch))
    masked = (~mask).nonzero().tolist()
    for (b, t), i in zip(masked, (10**12, -100, -1, *[53] * len(masked)), strict=False):
        spoiled.completion_ids[b, t] = i
    for x in (spoiled.hidden, spoiled.old_logps):
        x[~mask] = torch.nan
    out = run(route, spoiled, backend=backend)
    assert (out.logps[~mask] == 0).all() and (out.dhidden[~mask] == 0).all()
    assert_same(out, clean)


def named(route: str) -> str:
    function = ROUTES[route].function
    return {fastgrpo.linear_logps: "token_ids", fastgrpo.selected_logps: "selected_ids"}.get(
        function, "completion_ids"
    )


@routes()
def test_row_06_an_id_outside_the_vocabulary_is_an_error(backend, route):
    for foreign in (53, 10**12, -1):
        batch = make_batch(**SMALL)
        batch.completion_ids[0, 1] = foreign
        with pytest.raises(ValueError, match=f"{named(route)}: expected ids .* got {foreign}"):
            run(route, batch, backend=backend)


@routes()
def test_row_06_07_nobody_looks_at_an_id_outside_the_vocabulary(backend, route, monkeypatch):
    """As on a GPU: NaN at these tokens alone. Columns that fill up a tile match no id."""
    batch = make_batch(**SMALL)
    batch.completion_mask[:2] = True
    clean = run(route, batch, backend=backend)
    others = torch.ones_like(batch.completion_mask)
    for (b, t), foreign in FOREIGN.items():
        batch.completion_ids[b, t], others[b, t] = foreign, False
    monkeypatch.setattr(checks, "looks_at_values", lambda tensor: False)
    out = run(route, batch, backend=backend)
    assert out.value.isnan() and torch.equal(out.logps.isnan(), ~others)
    torch.testing.assert_close(out.logps[others], clean.logps[others])
    assert not out.dhidden.isfinite().all() and not out.dweight.isfinite().all()
