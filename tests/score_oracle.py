"""Operands of the kernels that score rows, and the fp64 formulas that they are held against."""

from __future__ import annotations

import torch

from fastgrpo_kernels import Marks, mask_words
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
    return hidden, weight, ids


def oracle(hidden, weight, ids, bias=None, inv_temperature=None, logit_scale=1.0, softcap=0.0):
    """fp64 logps, lse and entropy; -inf logits count for nothing."""
    z = hidden.double() @ weight.double().T
    z = z if bias is None else z + bias.double()
    z = z * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    z = z if inv_temperature is None else z * inv_temperature.double()[:, None]
    logps = z.log_softmax(1)
    entropy = -torch.where(logps == -torch.inf, 0.0, logps.exp() * logps).sum(1)
    return logps.gather(1, ids[:, None])[:, 0], z.logsumexp(1), entropy


def assert_accurate(actual, expected, *, atol=2e-5, rms=1e-5):
    """The accuracy bars: at most 2e-5 nats for any row, 1e-5 over the rows."""
    for name, a, e in zip(("logps", "lse", "entropy"), actual, expected, strict=True):
        error = (a.double() - e).abs()
        assert a.dtype == torch.float32
        assert error.max() <= atol, (name, error.max())
        assert error.square().mean().sqrt() <= rms, (name, error.square().mean().sqrt())


# ---- anchored: exponentials and marks ----------------------------------------------------------

PLAIN = (None, None, 1.0, 0.0)  # bias, inverse temperature, scale, softcap
DTYPES = [torch.float16, torch.bfloat16]


def transformed(vocab, n, dtype, scale=0.25, softcap=0.0):
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(1)).to(dtype)
    return bias, torch.linspace(0.5, 2.0, n), scale, softcap


TRANSFORMS = {
    "plain": lambda *_: PLAIN,
    "bias, temperature and scale": transformed,
    "softcap": lambda v, n, dtype: transformed(v, n, dtype, 1.0, 30.0),
    "tight softcap": lambda v, n, dtype: transformed(v, n, dtype, 2.0, 5.0),
}


def probabilities(hidden, weight, bias, inv_temperature, scale, softcap):
    """p (n, V) and the softcap's slope, fp64."""
    z = scale * (hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double()))
    slope = 1 - torch.tanh(z / softcap) ** 2 if softcap else torch.ones_like(z)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    z = z if inv_temperature is None else z * inv_temperature.double()[:, None]
    return z.softmax(1), slope


def assert_exps(exps, result, hidden, weight, ids, options):
    """They are p times the slope, rounded once to bf16 and accurate to 1e-5 before; 0 at ids."""
    p, slope = probabilities(hidden, weight, *options)
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
    return hidden.bfloat16(), weight.bfloat16(), torch.full((len(gaps),), 3)


def draw_of(n, vocab, anchor, seed=0):
    g = torch.Generator().manual_seed(seed)
    words = (torch.randint(2**23, (k,), generator=g, dtype=torch.int32) for k in (vocab, n))
    mask = torch.full((n, mask_words(vocab)), -1, dtype=torch.int32)
    return Marks(anchor, *words, mask)


def unpacked(mask, vocab):
    v = torch.arange(vocab)
    return (mask[:, 4 * (v // 128) + v // 2 % 4] >> (2 * (v // 8 % 16) + v % 2) & 1).bool()


def assert_marks(draw, hidden, weight, ids, options):
    """They are where e > u, but for ties within the accuracy of e; none beyond V."""
    vocab, (p, _) = len(weight), probabilities(hidden, weight, *options)
    lse = oracle(hidden, weight, ids, *options)[1]
    e = (p * (lse - draw.anchor).exp()[:, None]).scatter(1, ids[:, None], 0.0)
    u = (draw.column_words ^ draw.row_words[:, None]).double() / 2**23
    marked, sure = unpacked(draw.mask, vocab), (e - u).abs() > 1e-6 + 1e-4 * e
    assert torch.equal(marked[sure], (e > u)[sure])
    assert sure.double().mean() > 0.999 and 0.001 < marked.double().mean() < 0.5
    block = launch_for("anchored_logps", 16, "interpreter").blocks["BLOCK_V"]
    whole_tiles = -(-vocab // block) * block
    assert not unpacked(draw.mask, whole_tiles)[:, vocab:].any()
