"""A chunk of rows held as probabilities: scores from one softmax, and rows dropped in place."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig
from fastgrpo.head.held import Probabilities, _close_gaps
from fastgrpo.testing import relative_error
from fastgrpo.torch_kernels import tile_softmax
from fastgrpo_kernels import Head, Rows, Tile


@pytest.fixture
def held_so(monkeypatch):
    """A test that does not hold a chunk this way fails."""
    taken, begin = [], Probabilities.score
    monkeypatch.setattr(Probabilities, "score", lambda *args: taken.append(1) or begin(*args))
    yield
    assert taken


def results(logits, ids):
    """Scores and gradients of hidden states that are unit vectors: the weight is the logits."""
    rows = len(logits)
    hidden, weight = torch.eye(rows), logits.t().contiguous().requires_grad_()
    out = fastgrpo.grpo_loss(
        hidden[None], weight, ids[None], torch.ones(1, rows, dtype=torch.bool), torch.ones(1),
        config=LossConfig.preset("dapo", entropy="detached"), backend="torch",
    )  # fmt: skip
    out.loss.backward()
    return out.logps[0], out.entropy[0], weight.grad.t()


def exact(logits, ids):
    z = logits.double().requires_grad_()
    log_p = z.log_softmax(-1)
    logps = log_p.gather(1, ids[:, None])[:, 0]
    (dz,) = torch.autograd.grad(-logps.mean(), z)  # at a ratio of 1
    entropy = torch.special.entr(log_p.exp()).sum(1)
    return logps.detach(), entropy.detach(), dz


def assert_exact(logits, ids, atol=2e-5, rtol=1e-5):
    logps, entropy, dz = results(logits, ids)
    wanted_logps, wanted_entropy, wanted_dz = exact(logits, ids)
    assert ((logps - wanted_logps).abs() <= atol + 1e-6 * wanted_logps.abs()).all()
    assert (entropy - wanted_entropy).abs().max() <= atol
    assert relative_error(dz, wanted_dz) <= rtol


@pytest.mark.parametrize("spread", [1.0, 10.0, 60.0, 300.0])
def test_targets_of_any_probability(spread, held_so):
    """Down to what fp32 cannot hold, and up to all but 1."""
    g = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(64, 97, generator=g)
    ids = torch.randint(97, (64,), generator=g)
    ids[:8], ids[8:16] = logits[:8].argmin(1), logits[8:16].argmax(1)
    assert_exact(logits, ids)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_a_large_vocabulary(held_so, spread):
    """Where the rounding of a sum of 151,936 numbers shows: 1e-5 if they are added in a row."""
    g = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(6, 151_936, generator=g)
    assert_exact(logits, torch.randint(151_936, (6,), generator=g), atol=2e-6, rtol=2e-6)


def test_a_log_prob_is_never_above_0(held_so):
    logits = torch.zeros(300, 5)
    logits[:, 2] = torch.linspace(5.0, 40.0, 300)
    logps, _, _ = results(logits, torch.full((300,), 2))
    assert logps.max() <= 0


def test_an_id_outside_the_vocabulary_has_no_log_prob_and_spoils_nothing_else():
    g = torch.Generator().manual_seed(0)
    z, ids = torch.randn(4, 9, generator=g), torch.tensor([3, 9, -1, 0])
    head = Head(torch.zeros(9, 1))
    rows = Rows(torch.zeros(4, 1), ids)
    scored, _ = tile_softmax(Tile(z.clone(), slice(0, 9), None, rows, head), True)
    assert scored.logps.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(scored.lse, z.logsumexp(1))
    torch.testing.assert_close(scored.entropy, torch.special.entr(z.softmax(1)).sum(1))


@pytest.mark.parametrize("dead", [0.0, 0.02, 0.5, 0.9, 1.0])
def test_live_rows_close_the_gaps(dead):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(200, 7, generator=g)
    live = (torch.rand(200, generator=g) >= dead).nonzero()[:, 0]
    before = z.clone()
    order = _close_gaps(z, live)
    assert torch.equal(order.sort().values, live)
    assert torch.equal(z[: len(live)], before[order])
    stayed = live[live < len(live)]
    assert torch.equal(z[stayed], before[stayed]), "only rows beyond the last gap move"


@pytest.mark.parametrize("rows_at_once", [7, 64])
def test_rows_without_gradient_are_dropped_in_place(monkeypatch, rows_at_once, held_so):
    """Their order changes, and nothing else."""
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(64, 31, generator=g), torch.randint(31, (64,), generator=g)
    advantages = torch.randn(1, 64, generator=g)
    old = exact(logits, ids)[0].float() - (torch.rand(64, generator=g) < 0.4) * advantages[0].sign()
    grads, kept = [], []
    keep = Probabilities.keep
    monkeypatch.setattr(Probabilities, "keep", lambda *x: kept.append(1) or keep(*x))
    for drops in (True, False):
        monkeypatch.setattr(Probabilities, "worth_dropping", lambda self, n, drops=drops: drops)
        hidden, weight = torch.eye(64).requires_grad_(), logits.t().clone().requires_grad_()
        bias = torch.zeros(31, requires_grad=True)
        out = fastgrpo.grpo_loss(
            hidden[None], weight, ids[None], torch.ones(1, 64, dtype=torch.bool), advantages,
            old_logps=old[None], config="dapo", bias=bias, backend="torch",
            workspace_mb=rows_at_once * 31 * 4 / 2**20,
        )  # fmt: skip
        assert 0.4 < out.metrics["live_rows"] < 0.9
        grads.append(torch.autograd.grad(out.loss, (hidden, weight, bias)))
    assert len(kept) == -(-64 // rows_at_once)
    for dropped, whole in zip(*grads, strict=True):
        torch.testing.assert_close(dropped, whole, rtol=1e-5, atol=1e-8)
