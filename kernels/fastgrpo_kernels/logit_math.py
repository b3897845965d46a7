"""Device functions shared by the kernels that see logits: the transform and the online softmax.

Notation and derivations: kernels/README.md. Everything is fp32.
"""

from __future__ import annotations

from .runtime import jit, tl


@jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0, with its relative accuracy kept as x goes to 0."""
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))
    small = -x * (1.0 + x * (0.5 + x * (1 / 6 + x * series)))
    return tl.where(x > -0.25, small, 1.0 - tl.exp(x))


@jit
def log1p_exp(x):
    """log(1 + exp(x)), with its relative accuracy kept where it is small."""
    y = tl.exp(-tl.abs(x))
    # log(1 + y) = 2 artanh(y / (2 + y)), whose argument is at most 1/3.
    s = y / (2.0 + y)
    s2 = s * s
    series = 1 / 9 + s2 * (1 / 11 + s2 * (1 / 13 + s2 * (1 / 15)))
    series = 1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * series)))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@jit
def softcapped(z, softcap):
    """softcap tanh(z / softcap), and its derivative."""
    # One live value per element: the epilogue of a wide tile has no registers for more.
    tanh = 1.0 - 2.0 / (1.0 + tl.exp(z * (2.0 / softcap)))
    return tanh * softcap, 1.0 - tanh * tanh


@jit
def transform_logits(z0, logit_scale, softcap, inv_temperature, SOFTCAP: tl.constexpr):
    """z = softcap(logit_scale z0) inv_temperature, and dz/dz0."""
    z = z0 * logit_scale
    slope = logit_scale * inv_temperature
    if SOFTCAP:
        z, uncapped = softcapped(z, softcap)
        slope = slope * uncapped
    return z * inv_temperature, slope


@jit
def softmax_stats(z, WITH_ENTROPY: tl.constexpr):
    """Along axis 1: m = max z, s = sum exp(z - m), d = sum exp(z - m) (z - m)."""
    m = tl.max(z, 1)
    # exp(-200) is 0 like exp(-inf), but 0 times -200 is 0 and not NaN. Where all logits are -inf,
    # a shift of 0 avoids the difference of two infinities. NaN stays NaN.
    shift = tl.where(m == float("-inf"), 0.0, m)[:, None]
    gap = tl.maximum(z - shift, -200.0, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp(gap)
    d = tl.zeros_like(m)
    if WITH_ENTROPY:
        d = tl.sum(e * gap, 1)
    return m, tl.sum(e, 1), d


@jit
def merge_stats(m1, s1, d1, m2, s2, d2):
    """Softmax statistics of the union of two sets of logits."""
    m = tl.maximum(m1, m2)
    gap1 = tl.where(m1 == float("-inf"), 0.0, m1 - m)
    gap2 = tl.where(m2 == float("-inf"), 0.0, m2 - m)
    a1 = tl.exp(gap1)
    a2 = tl.exp(gap2)
    return m, s1 * a1 + s2 * a2, (d1 + s1 * gap1) * a1 + (d2 + s2 * gap2) * a2


@jit
def slice_index(ids, start, size):
    """Position of each id in [start, start + size) as int32, -1 for an id outside."""
    inside = (ids >= start) & (ids < start + size)
    return tl.where(inside, ids - start, -1).to(tl.int32)
