"""Policy-gradient surrogates: one entry per variant, with value, derivative and formula.

Each is written once. `fn` runs inside the Triton kernel and, through `torch_twin`, on torch
tensors. `formula` is the same loss as its paper writes it. The tests compare the hand-written
derivative with its autograd.

    r = exp(log_ratio), of a token or its sequence        A = advantage        sg = stop-gradient
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .runtime import jit, tl
from .twins import bounded_exp, choose, clip, outside


class Surrogate(NamedTuple):
    """A policy loss L of one token.

    fn(logp, log_ratio, advantage, context, *parameters) -> (L, slope, clipped). The slope is
    dL/dlog_ratio, or dL/dlogp where the importance weight is a constant; `slope` says which.
    clipped is -1 where a lower bound took effect, 1 where an upper one did, else 0.
    formula(same arguments) -> L, differentiable.
    """

    fn: Callable
    formula: Callable[..., Tensor]
    # The parameters of fn after its tensors, in order: fields of `LossConfig`. For a loss from
    # outside the package: names of its own, with their defaults.
    parameters: tuple[str, ...] | Mapping[str, float]
    ratio_levels: tuple[str, ...] = ("token", "sequence", "sequence_sum")
    slope: str = "ratio"  # or "logp"
    context: str | None = None  # a key of CONTEXT_FIELDS: the rule that gives each token a constant
    options: tuple[str, ...] = ()  # the fields that bound the log-ratio before fn sees it
    inert: bool = True  # whether advantage 0 means no gradient

    @property
    def own(self) -> Mapping[str, float]:
        """The parameters that are not fields of `LossConfig`, with their defaults."""
        return self.parameters if isinstance(self.parameters, Mapping) else {}

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of `LossConfig` that the loss reads."""
        read = (name for name in self.parameters if name not in self.own)
        by_context = CONTEXT_FIELDS[self.context] if self.context else ()
        return (*read, *self.options, *by_context)


def _exp(x: Tensor) -> Tensor:
    """exp(x), saturating at x = 80 in value and in derivative."""
    return torch.exp(x - (x.detach() - 80).clamp(min=0))


@jit
def reinforce(logp, log_ratio, advantage, context):
    """-A logp, without a ratio (Williams 1992).

    With weights as advantages it is the weighted negative log-likelihood.
    """
    return -advantage * logp, -advantage, advantage * 0.0


def reinforce_formula(logp, log_ratio, advantage, context) -> Tensor:
    return -advantage * logp


@jit
def importance_sampling(logp, log_ratio, advantage, context):
    """-r A: the importance-sampled policy gradient, unclipped."""
    loss = -bounded_exp(log_ratio) * advantage
    return loss, loss, loss * 0.0


def importance_sampling_formula(logp, log_ratio, advantage, context) -> Tensor:
    return -_exp(log_ratio) * advantage


@jit
def ppo_clip(logp, log_ratio, advantage, context, epsilon_low, epsilon_high, delta):
    """-min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A).

    Schulman et al. 2017 (arXiv 1707.06347). delta also bounds r where A < 0; inf turns it off (dual
    clip: Ye et al. 2020, arXiv 1912.09729; INTELLECT-2, arXiv 2505.07291). There is a gradient only
    where the minimum is r itself.
    """
    ratio = bounded_exp(log_ratio)
    bounded = tl.where(ratio > delta, delta, ratio)
    clipped = clip(ratio, 1.0 - epsilon_low, 1.0 + epsilon_high)
    chosen = tl.where(bounded * advantage <= clipped * advantage, bounded, clipped)
    side = tl.where(advantage == 0.0, 0.0, outside(ratio, chosen, chosen))
    return -chosen * advantage, tl.where(chosen == ratio, -ratio * advantage, 0.0), side


def ppo_clip_formula(
    logp, log_ratio, advantage, context, epsilon_low, epsilon_high, delta
) -> Tensor:
    ratio = _exp(log_ratio)
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(ratio.clamp(max=delta) * advantage, clipped * advantage)


@jit
def cispo(logp, log_ratio, advantage, context, epsilon_low, epsilon_high):
    """-sg(clip(r, 1 - epsilon_low, 1 + epsilon_high)) A logp: every token keeps its gradient.

    MiniMax-M1 (arXiv 2506.13585). The bounds are offsets from 1, as in verl and NeMo-RL.
    epsilon_low = 1 and epsilon_high = 0 bound the weight to [0, 1] (ROLL's TIS).
    """
    ratio = bounded_exp(log_ratio)
    weight = clip(ratio, 1.0 - epsilon_low, 1.0 + epsilon_high)
    side = outside(ratio, 1.0 - epsilon_low, 1.0 + epsilon_high)
    return -weight * advantage * logp, -weight * advantage, side


def cispo_formula(logp, log_ratio, advantage, context, epsilon_low, epsilon_high) -> Tensor:
    weight = _exp(log_ratio).clamp(1 - epsilon_low, 1 + epsilon_high)
    return -weight.detach() * advantage * logp


@jit
def cispo_raw(logp, log_ratio, advantage, context, epsilon_high):
    """-sg(min(r, epsilon_high)) A logp: CISPO in TRL and Liger.

    epsilon_high is the upper bound itself, not an offset from 1. There is no lower bound.
    """
    ratio = bounded_exp(log_ratio)
    weight = tl.where(ratio > epsilon_high, epsilon_high, ratio)
    return -weight * advantage * logp, -weight * advantage, outside(ratio, 0.0, epsilon_high)


def cispo_raw_formula(logp, log_ratio, advantage, context, epsilon_high) -> Tensor:
    return -_exp(log_ratio).clamp(max=epsilon_high).detach() * advantage * logp


@jit
def sapo(logp, log_ratio, advantage, context, temperature_pos, temperature_neg):
    """-(4 / t) sigmoid(t (r - 1)) A: a soft gate (Gao et al. 2025, arXiv 2511.20347).

    t is temperature_pos where A > 0, else temperature_neg.
    """
    ratio = bounded_exp(log_ratio)
    t = choose(advantage > 0.0, temperature_pos, temperature_neg, advantage)
    gate = tl.sigmoid(t * (ratio - 1.0))
    # sigmoid(-x) is 1 - sigmoid(x) without its cancellation.
    slope = 4.0 * gate * tl.sigmoid(t * (1.0 - ratio)) * ratio
    return -4.0 * gate / t * advantage, -slope * advantage, advantage * 0.0


def sapo_formula(logp, log_ratio, advantage, context, temperature_pos, temperature_neg) -> Tensor:
    def gate(t: float) -> Tensor:
        return 4 / t * torch.sigmoid(t * (_exp(log_ratio) - 1))

    return -torch.where(advantage > 0, gate(temperature_pos), gate(temperature_neg)) * advantage


@jit
def vespo(logp, log_ratio, advantage, context, k_pos, lambda_pos, k_neg, lambda_neg):
    """-sg(w^k exp(lambda (1 - w))) A logp, where w is the ratio of the whole sequence (VESPO).

    `context` is log w: the sum of the tokens' log-ratios and of their log-corrections. As in TRL, w
    is bounded to [1e-8, e^20], and (k, lambda) are the pair "pos" where A >= 0, else "neg".
    """
    k = choose(advantage >= 0.0, k_pos, k_neg, advantage)
    rate = choose(advantage >= 0.0, lambda_pos, lambda_neg, advantage)
    log_w = clip(context, -18.420680743952367, 20.0)
    weight = tl.exp(rate + k * log_w - rate * tl.exp(log_w))
    side = outside(context, -18.420680743952367, 20.0)
    return -weight * advantage * logp, -weight * advantage, side


def vespo_formula(
    logp, log_ratio, advantage, context, k_pos, lambda_pos, k_neg, lambda_neg
) -> Tensor:
    w = context.exp().clamp(1e-8, math.exp(20))
    pos = w**k_pos * torch.exp(lambda_pos * (1 - w))
    neg = w**k_neg * torch.exp(lambda_neg * (1 - w))
    return -torch.where(advantage >= 0, pos, neg) * advantage * logp


@jit
def pushed_outside(logp, log_ratio, advantage, low, high):
    """The side on which pi - pi_old is outside [-low, high], if A pushes it further out; else 0."""
    side = outside(tl.exp(logp) - tl.exp(logp - log_ratio), -low, high)
    return tl.where(side == tl.where(advantage > 0.0, 1.0, -1.0), side, 0.0)


@jit
def dppo_tv(logp, log_ratio, advantage, context, epsilon_low, epsilon_high, delta):
    """-sg(min(r, delta)) A logp while pi - pi_old stays within [-epsilon_low, epsilon_high].

    DPPO with the binary total variation (arXiv 2602.04879). The upper bound applies where A > 0,
    the lower one elsewhere. delta truncates the weight; inf turns that off.
    """
    ratio = bounded_exp(log_ratio)
    side = pushed_outside(logp, log_ratio, advantage, epsilon_low, epsilon_high)
    weight = tl.where(side == 0.0, tl.where(ratio > delta, delta, ratio), 0.0)
    return -weight * advantage * logp, -weight * advantage, side


def dppo_tv_formula(logp, log_ratio, advantage, context, epsilon_low, epsilon_high, delta):
    moved = (logp.exp() - (logp - log_ratio).exp()).detach()
    valid = torch.where(advantage > 0, moved <= epsilon_high, moved >= -epsilon_low)
    return -advantage * _exp(log_ratio).clamp(max=delta).detach() * logp * valid


@jit
def dppo_kl(logp, log_ratio, advantage, context, epsilon_low, epsilon_high, delta):
    """-sg(min(r, delta)) A logp while the binary KL from pi_old stays within its bound.

    DPPO with D = KL(Bernoulli(pi_old) || Bernoulli(pi)) (arXiv 2602.04879; 1e-8 as in verl). A
    token is dropped if D is too large and pi has moved in the direction in which A pushes it.
    """
    ratio = bounded_exp(log_ratio)
    # Log-probs may be rounded, by the sampler or here: keep probabilities at 1 or below.
    p = clip(tl.exp(logp), 0.0, 1.0)
    old = clip(tl.exp(logp - log_ratio), 0.0, 1.0)
    divergence = -old * log_ratio + (1.0 - old) * tl.log((1.0 - old + 1e-8) / (1.0 - p + 1e-8))
    up = (divergence > epsilon_high) & (p > old) & (advantage > 0.0)
    down = (divergence > epsilon_low) & (p < old) & (advantage <= 0.0)
    side = tl.where(up, 1.0, tl.where(down, -1.0, 0.0))
    weight = tl.where(side == 0.0, tl.where(ratio > delta, delta, ratio), 0.0)
    return -weight * advantage * logp, -weight * advantage, side


def dppo_kl_formula(logp, log_ratio, advantage, context, epsilon_low, epsilon_high, delta):
    p, old = logp.detach().exp(), (logp - log_ratio).detach().exp().clamp(max=1)
    d = -old * log_ratio.detach() + (1 - old) * torch.log((1 - old + 1e-8) / (1 - p + 1e-8))
    valid = torch.where(
        advantage > 0, (d <= epsilon_high) | (p <= old), (d <= epsilon_low) | (p >= old)
    )
    return -advantage * _exp(log_ratio).clamp(max=delta).detach() * logp * valid


@jit
def prime_dppo(logp, log_ratio, advantage, context, epsilon_low, epsilon_high, proximal_coef):
    """-keep r A + proximal_coef / 2 log_ratio^2, with keep as in `dppo_tv` (prime-rl's default).

    DPPO's mask with Kimi-K2.5's quadratic penalty (arXiv 2602.02276). The penalty acts on dropped
    tokens too.
    """
    ratio = bounded_exp(log_ratio)
    side = pushed_outside(logp, log_ratio, advantage, epsilon_low, epsilon_high)
    policy = tl.where(side == 0.0, -ratio * advantage, 0.0)
    pull = proximal_coef * log_ratio
    return policy + 0.5 * pull * log_ratio, policy + pull, side


def prime_dppo_formula(
    logp, log_ratio, advantage, context, epsilon_low, epsilon_high, proximal_coef
) -> Tensor:
    moved = (logp.exp() - (logp - log_ratio).exp()).detach()
    keep = torch.where(advantage > 0, moved <= epsilon_high, moved >= -epsilon_low)
    return keep * -_exp(log_ratio) * advantage + proximal_coef / 2 * log_ratio**2


@jit
def ipo(logp, log_ratio, advantage, context, epsilon_low, epsilon_high, proximal_coef):
    """As `prime_dppo`, but both bounds hold whatever the sign of A (prime-rl's "ipo")."""
    ratio = bounded_exp(log_ratio)
    moved = tl.exp(logp) - tl.exp(logp - log_ratio)
    side = outside(moved, -epsilon_low, epsilon_high)
    policy = tl.where(side == 0.0, -ratio * advantage, 0.0)
    pull = proximal_coef * log_ratio
    return policy + 0.5 * pull * log_ratio, policy + pull, side


def ipo_formula(
    logp, log_ratio, advantage, context, epsilon_low, epsilon_high, proximal_coef
) -> Tensor:
    moved = (logp.exp() - (logp - log_ratio).exp()).detach()
    keep = (moved <= epsilon_high) & (moved >= -epsilon_low)
    return keep * -_exp(log_ratio) * advantage + proximal_coef / 2 * log_ratio**2


@jit
def dro(logp, log_ratio, advantage, context, proximal_coef):
    """-A logp + proximal_coef / 2 log_ratio^2.

    Direct reward optimisation (arXiv 2405.19107) per token, as in verl; ROLL's Kimi-K1.5 loss.
    """
    pull = proximal_coef * log_ratio
    return -advantage * logp + 0.5 * pull * log_ratio, pull - advantage, advantage * 0.0


def dro_formula(logp, log_ratio, advantage, context, proximal_coef) -> Tensor:
    return -(advantage * logp - proximal_coef / 2 * log_ratio**2)


@jit
def topr(logp, log_ratio, advantage, context):
    """-A logp where A > 0, -sg(min(r, 1)) A logp elsewhere.

    Tapered off-policy REINFORCE (arXiv 2503.14286).
    """
    ratio = bounded_exp(log_ratio)
    tapered = (advantage <= 0.0) & (ratio > 1.0)
    weight = tl.where((advantage > 0.0) | tapered, 1.0, ratio)
    return -weight * advantage * logp, -weight * advantage, tl.where(tapered, 1.0, 0.0)


def topr_formula(logp, log_ratio, advantage, context) -> Tensor:
    tapered = -_exp(log_ratio).clamp(0, 1).detach() * advantage * logp
    return torch.where(advantage > 0, -advantage * logp, tapered)


@jit
def clip_cov(logp, log_ratio, advantage, context, epsilon_low, epsilon_high, delta):
    """`ppo_clip` times context (Cui et al. 2025, arXiv 2505.22617).

    context is 0 on the tokens that are drawn from those of high covariance, else 1.
    """
    loss, slope, side = ppo_clip(
        logp, log_ratio, advantage, context, epsilon_low, epsilon_high, delta
    )
    return loss * context, slope * context, side


def clip_cov_formula(logp, log_ratio, advantage, context, *bounds) -> Tensor:
    return context * ppo_clip_formula(logp, log_ratio, advantage, context, *bounds)


@jit
def kl_cov(logp, log_ratio, advantage, context, kl_cov_coef):
    """-r A + context * kl_cov_coef |log_ratio| (Cui et al. 2025, arXiv 2505.22617).

    context is 1 on the tokens of highest covariance, else 0.
    """
    policy = -bounded_exp(log_ratio) * advantage
    pull = kl_cov_coef * context * outside(log_ratio, 0.0, 0.0)
    return policy + pull * log_ratio, policy + pull, advantage * 0.0


def kl_cov_formula(logp, log_ratio, advantage, context, kl_cov_coef) -> Tensor:
    return -_exp(log_ratio) * advantage + kl_cov_coef * context * log_ratio.abs()


BOUNDS = ("epsilon_low", "epsilon_high", "delta")
VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
TRUST_REGION = ("epsilon_low", "epsilon_high", "proximal_coef")
RATIO_LEVELS = ("none", "token", "sequence", "sequence_token", "sequence_sum")
WITH_GRADIENT = RATIO_LEVELS[1:]
SLOPES = ("ratio", "logp")

# Rule of `fastgrpo.objective.contexts` -> the fields of `LossConfig` that it reads.
CONTEXT_FIELDS: dict[str, tuple[str, ...]] = {
    "drawn_covariance": ("epsilon_low", "epsilon_high", "cov_ratio", "cov_low", "cov_high"),
    "top_covariance": ("cov_ratio",),
    "future_ratio": ("delta", "fipo_half_life", "fipo_low", "fipo_high", "fipo_safety_ratio"),
    "log_weight": (),
}
# The rules that look at all sequences of a call; the others look at a token's own.
BATCH_CONTEXTS = ("drawn_covariance", "top_covariance")

SURROGATES: dict[str, Surrogate] = {
    "reinforce": Surrogate(reinforce, reinforce_formula, (), ("none",), "logp"),
    "importance_sampling": Surrogate(
        importance_sampling, importance_sampling_formula, (), WITH_GRADIENT
    ),
    "ppo_clip": Surrogate(ppo_clip, ppo_clip_formula, BOUNDS, WITH_GRADIENT),
    # The weight is a constant, so that "sequence_token" would be the same as "sequence".
    "cispo": Surrogate(cispo, cispo_formula, BOUNDS[:2], slope="logp"),
    "cispo_raw": Surrogate(cispo_raw, cispo_raw_formula, BOUNDS[1:2], slope="logp"),
    "sapo": Surrogate(
        sapo, sapo_formula, ("sapo_temperature_pos", "sapo_temperature_neg"), WITH_GRADIENT
    ),
    # The geometric mean of ratios that are bounded token by token, in log space.
    "gmpo": Surrogate(
        importance_sampling,
        importance_sampling_formula,
        (),
        ("sequence",),
        options=("epsilon_low", "epsilon_high"),
    ),
    # The weight is that of the sequence at any level; the token's ratio serves a corrected KL.
    "vespo": Surrogate(vespo, vespo_formula, VESPO, ("token",), "logp", context="log_weight"),
    "dppo_tv": Surrogate(dppo_tv, dppo_tv_formula, BOUNDS, ("token",), "logp"),
    "dppo_kl": Surrogate(dppo_kl, dppo_kl_formula, BOUNDS, ("token",), "logp"),
    "prime_dppo": Surrogate(prime_dppo, prime_dppo_formula, TRUST_REGION, ("token",), inert=False),
    "ipo": Surrogate(ipo, ipo_formula, TRUST_REGION, ("token",), inert=False),
    "dro": Surrogate(dro, dro_formula, ("proximal_coef",), ("token",), "logp", inert=False),
    "topr": Surrogate(topr, topr_formula, (), slope="logp"),
    "clip_cov": Surrogate(
        clip_cov, clip_cov_formula, BOUNDS, ("token",), context="drawn_covariance"
    ),
    "kl_cov": Surrogate(
        kl_cov, kl_cov_formula, ("kl_cov_coef",), ("token",), context="top_covariance", inert=False
    ),
    # `ppo_clip` times the influence of a token on the tokens after it.
    "fipo": Surrogate(clip_cov, clip_cov_formula, BOUNDS, ("token",), context="future_ratio"),
}
