"""Operands of the kernels that score rows, and the fp64 formulas they are compared with."""

from __future__ import annotations

import torch

from fastgrpo_kernels import Draw, Head, Marks, Rows, mask_words
from fastgrpo_kernels.runtime import launch_for


def problem(n, vocab, hidden_size, dtype, weight_dtype=None, spread=4.0, seed=0):
    """Rows whose logits have a standard deviation of `spread` nats, half of the targets likely."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, hidden_size, generator=g).to(dtype)
    weight = torch.randn(vocab, hidden_size, generator=g) * spread / hidden_size**0.5
    weight = weight.to(weight_dtype or dtype)
    ids = torch.randint(0, vocab, (n,), generator=g)
    if n:
        ids[::2] = (hidden.double() @ weight.double().T).argmax(1)[::2]
    return Rows(hidden, ids), Head(weight)


def logits(rows, head):
    """fp64 z (n, V), and the softcap's slope."""
    z = rows.hidden.double() @ head.weight.double().T
    z = z if head.bias is None else z + head.bias.double()
    z = z * head.logit_scale
    slope = torch.ones_like(z)
    if head.softcap:
        tanh = torch.tanh(z / head.softcap)
        z, slope = head.softcap * tanh, 1 - tanh**2
    z = z if rows.inv_temperature is None else z * rows.inv_temperature.double()[:, None]
    return z, slope


def oracle(rows, head):
    """fp64 logps, lse and entropy; -inf logits count for nothing."""
    z, _ = logits(rows, head)
    logps = z.log_softmax(1)
    entropy = -torch.where(logps == -torch.inf, 0.0, logps.exp() * logps).sum(1)
    return logps.gather(1, rows.ids[:, None])[:, 0], z.logsumexp(1), entropy


def assert_accurate(actual, expected, *, atol=2e-5, rms=1e-5):
    """The accuracy bars: at most 2e-5 nats for any row, 1e-5 over the rows."""
    for name, a, e in zip(("logps", "lse", "entropy"), actual, expected, strict=True):
        error = (a.double() - e).abs()
        assert a.dtype == torch.float32
        assert error.max() <= atol, (name, error.max())
        assert error.square().mean().sqrt() <= rms, (name, error.square().mean().sqrt())


# ---- anchored: exponentials and marks ----------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16]


def transformed(rows, head, logit_scale=0.25, softcap=0.0):
    """The same operands with a bias, a temperature per row, a scale and a softcap."""
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(len(head.weight), generator=g).to(head.weight.dtype)
    rows = rows._replace(inv_temperature=torch.linspace(0.5, 2.0, len(rows.ids)))
    return rows, head._replace(bias=bias, logit_scale=logit_scale, softcap=softcap)


TRANSFORMS = {
    "plain": lambda *operands: operands,
    "bias, temperature and scale": transformed,
    "softcap": lambda *operands: transformed(*operands, 1.0, 30.0),
    "tight softcap": lambda *operands: transformed(*operands, 2.0, 5.0),
}


def assert_exps(exps, result, rows, head):
    """They are p times the slope, rounded once to bf16 and accurate to 1e-5 before; 0 at ids."""
    z, slope = logits(rows, head)
    p, ids = z.softmax(1), rows.ids
    wanted = (p * slope).scatter(1, ids[:, None], 0.0)
    actual = exps.double() * result.log_scale.double().exp()[:, None]
    error = (actual - wanted).abs()
    # The slope comes from a tanh near 1: its error is absolute. Smallest: 2^-126, times e^40.
    assert (error <= (2**-8 + 2e-5) * wanted + 1e-5 * (slope < 1) * p + 1e-20).all()
    assert (exps[torch.arange(len(ids)), ids] == 0).all()


def confident(gaps, vocab=601, hidden_size=40):
    """One row per gap: its token's logit stands that many nats above one other, the rest at 0."""
    weight = torch.zeros(vocab, hidden_size)
    weight[3, 0] = weight[7, 1] = 1.0
    hidden = torch.zeros(len(gaps), hidden_size)
    hidden[:, 0] = torch.tensor(gaps).clamp(min=0)
    hidden[:, 1] = -torch.tensor(gaps).clamp(max=0)
    return Rows(hidden.bfloat16(), torch.full((len(gaps),), 3)), Head(weight.bfloat16())


def marks_of(n, vocab, anchor, seed=0):
    g = torch.Generator().manual_seed(seed)
    words = (torch.randint(2**23, (k,), generator=g, dtype=torch.int32) for k in (vocab, n))
    mask = torch.full((n, mask_words(vocab)), -1, dtype=torch.int32)
    return Marks(Draw(anchor, *words), mask)


def unpacked(mask, vocab):
    v = torch.arange(vocab)
    return (mask[:, 4 * (v // 128) + v // 2 % 4] >> (2 * (v // 8 % 16) + v % 2) & 1).bool()


def assert_marks(marks, rows, head):
    """They are where e > u, but for ties within the accuracy of e; none beyond V."""
    (draw, mask), vocab = marks, len(head.weight)
    z, _ = logits(rows, head)
    e = z.softmax(1) * (z.logsumexp(1) - draw.anchor).exp()[:, None]
    e = e.scatter(1, rows.ids[:, None], 0.0)
    u = (draw.column_words ^ draw.row_words[:, None]).double() / 2**23
    marked, sure = unpacked(mask, vocab), (e - u).abs() > 1e-6 + 1e-4 * e
    assert torch.equal(marked[sure], (e > u)[sure])
    assert sure.double().mean() > 0.999 and 0.001 < marked.double().mean() < 0.5
    block = launch_for("anchored_logps", 16, "interpreter").blocks["BLOCK_V"]
    whole_tiles = -(-vocab // block) * block
    assert not unpacked(mask, whole_tiles)[:, vocab:].any()
