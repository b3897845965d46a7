"""The fields of a loss, and what follows from them.

    surrogate      the policy loss of one token      `fastgrpo_kernels.surrogates`
    ratio level    which log-ratio it sees           `RATIO_LEVELS`
    correction     constants on the policy loss      `fastgrpo.objective.corrections`
    kl, entropy    what is added to it               `fastgrpo_kernels.kl_estimators`
    aggregation    how tokens are weighed            `AGGREGATIONS`

`fastgrpo.objective.rules` says which values a field may have and beside which others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastgrpo_kernels.surrogates import BATCH_CONTEXTS, SURROGATES, Surrogate

AGGREGATIONS = (
    "token_mean",  # sum over tokens / number of tokens
    "sequence_mean",  # mean over sequences of the mean over their tokens
    "fixed_length",  # sum over tokens / (B * max_completion_length)
    "token_sum",  # sum over tokens
    "sequence_sum",  # mean over sequences of the sum over their tokens
    "prompt_mean",  # mean over prompts of the mean over the tokens of all their completions
)
ENTROPY_MODES = ("none", "detached", "differentiable")
ANCHORS = ("old", "sampler")

# Correction -> (is its decision one per sequence, its default bounds).
CORRECTIONS: dict[str, tuple[bool, tuple[float, float]]] = {
    "none": (False, (0.0, math.inf)),
    "token_tis": (False, (0.0, 2.0)),
    "icepop": (False, (0.5, 5.0)),
    "sequence_tis": (True, (0.0, 2.0)),
    "sequence_mis": (True, (0.0, 3.0)),
    "seq_mask_tis": (True, (0.999, 1.002)),
}
REJECTIONS = ("none",) + tuple(
    f"{level}_{k}"
    for level in ("token", "seq_sum", "seq_mean", "seq_max")
    for k in ("k1", "k2", "k3")
    if (level, k) != ("seq_max", "k1")
)


def surrogate_named(name: str) -> Surrogate:
    """Return the surrogate, where it is known to this process."""
    if name not in tuple(SURROGATES):
        raise ValueError(
            f"surrogate: expected one of {list(SURROGATES)}, got {name!r}; a loss of your own is "
            "known once the module that calls register_surrogate is imported"
        )
    return SURROGATES[name]


@dataclass(frozen=True, kw_only=True)
class LossFields:
    """What describes a loss, unchecked: `LossConfig` is this with its rules."""

    surrogate: str = "ppo_clip"
    """Loss of one token: a key of `fastgrpo_kernels.surrogates.SURROGATES`, where
    `register_surrogate` adds one of your own."""
    surrogate_parameters: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    """What such a loss of your own takes: {name: number}, its defaults where left out. Stored as
    pairs. The package's own losses have fields instead, below."""
    ratio_level: str = "token"
    """The log-ratio it sees: a "token"'s own; the mean over its "sequence"; that mean with the
    token's gradient ("sequence_token"); the sum over the sequence ("sequence_sum"); or "none"."""
    anchor: str = "old"
    """What the ratio is to: "old" (old_logps), or "sampler" (sampler_logps; old_logps where none
    are given)."""
    aggregation: str = "sequence_mean"
    """How tokens are weighed: one of `fastgrpo.objective.fields.AGGREGATIONS`."""
    max_completion_length: int | None = None
    """L_max of "fixed_length"; may be left out when the call gives `normalizer`."""

    epsilon_low: float = 0.2
    """Lower bound of the ratio at 1 - epsilon_low; "gmpo": of its logarithm at -epsilon_low; DPPO
    and its kin: of the divergence."""
    epsilon_high: float = 0.2
    """Upper bound of the ratio at 1 + epsilon_high; "gmpo": of its logarithm; DPPO and its kin: of
    the divergence; "cispo_raw": of the ratio itself."""
    delta: float | None = None
    """Second upper bound of the ratio: where A < 0 ("ppo_clip" and its kin), or of the weight
    (DPPO). None = off."""
    log_ratio_clamp: float | None = None
    """Token log-ratios stay within +-this (verl, OpenRLHF: 20). Outside there is no gradient."""
    proximal_coef: float = 0.0
    """proximal_coef / 2 * log_ratio^2 is added ("prime_dppo", "ipo", "dro")."""
    sapo_temperature_pos: float = 1.0
    """Steepness of the gate where A > 0."""
    sapo_temperature_neg: float = 1.05
    """Steepness of the gate elsewhere."""
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    """Shape of the weight w^k exp(lambda (1 - w)), by the sign of A."""
    cov_ratio: float = 2e-4
    """Share of the call's tokens, at least one, that "clip_cov" drops and "kl_cov" penalises."""
    cov_low: float = 1.0
    """"clip_cov" draws among tokens whose covariance of A and logp is above this."""
    cov_high: float = 5.0
    """It draws among tokens whose covariance is below this."""
    kl_cov_coef: float = 0.1
    """Weight of |log_ratio| on the tokens that "kl_cov" chooses."""
    fipo_half_life: float = 32.0
    """Tokens after which the log-ratio of a later token counts half."""
    fipo_low: float = 1.0
    """Lower bound of the influence weight."""
    fipo_high: float = 1.2
    """Upper bound of the influence weight."""
    fipo_safety_ratio: float | None = 4.0
    """Where A < 0 and the ratio is above this the influence weight stays in [0.8, 1]."""

    correction: str = "none"
    """Weight on the policy loss, made of w = exp(old_logps - sampler_logps). "token_tis" clips w,
    "sequence_tis" the product of w over the sequence. "icepop" takes w and "sequence_mis" the
    product, and 0 where it is out of bounds. "seq_mask_tis" takes w, and 0 in sequences whose
    geometric mean of w is out of bounds."""
    correction_min: float | None = None
    """Lower bound of that weight. None = the correction's own."""
    correction_max: float | None = None
    """Upper bound of that weight. None = the correction's own."""
    rejection: str = "none"
    """Tokens or sequences too far from the sampler get no policy loss: "token", "seq_sum",
    "seq_mean" or "seq_max", then "_k1", "_k2" or "_k3", as in `fastgrpo.rejection_mask`."""
    rejection_min: float | None = None
    """Lower bound of sampler / old probability, for k1 only. None = 1 / rejection_max."""
    rejection_max: float | None = None
    """Upper bound of the divergence, or for k1 of sampler / old probability."""
    off_policy_mask_threshold: float | None = None
    """A sequence with A < 0 gets no policy loss where its mean of sampler_logps - logps is above
    this (DeepSeek-V3.2). old_logps stand in where there are no sampler_logps. None = off."""
    top_entropy_quantile: float = 1.0
    """The policy loss and the entropy bonus act on this share of tokens, those of highest entropy
    (arXiv 2506.01939); the denominator and the KL stay."""

    beta: float = 0.0
    """Weight of the per-token KL to the reference policy, added before aggregation."""
    kl: str = "k3"
    """Its estimator: "k1", "k2", "k3" or "abs"."""
    kl_gradient: str = "value"
    """What is differentiated: the "value"; k2, under this value ("straight_through"); the ratio
    times the value ("importance"); or exp(logp - sg(logp)) times the value ("score_function")."""
    kl_input_clamp: float | None = None
    """ref_logps - logps stay within +-this (verl, NeMo-RL: 20). Outside there is no gradient,
    except with "straight_through"."""
    kl_output_clamp: float | None = None
    """The estimate stays within +-this (verl, NeMo-RL: 10). Outside there is no gradient, except
    with "straight_through"."""

    entropy: str = "none"
    """What `GRPOLoss.entropy` holds: "none", "detached" or "differentiable" values."""
    entropy_coef: float = 0.0
    """Entropy bonus: the loss is lowered by this times the entropy, aggregated like the loss."""

    @property
    def rule(self) -> Surrogate:
        return surrogate_named(self.surrogate)

    @property
    def parameters(self) -> tuple[float, ...]:
        """What the surrogate's function takes after its tensors; None is an infinite bound."""
        own = dict(self.surrogate_parameters)
        values = (own[n] if n in own else getattr(self, n) for n in self.rule.parameters)
        return tuple(math.inf if value is None else float(value) for value in values)

    @property
    def correction_bounds(self) -> tuple[float, float]:
        low, high = CORRECTIONS[self.correction][1]
        low = low if self.correction_min is None else self.correction_min
        return low, high if self.correction_max is None else self.correction_max

    @property
    def rejection_bounds(self) -> tuple[float, float]:
        """Lower and upper bound: of the divergence, or of sampler / old probability for k1."""
        if not self.rejection.endswith("k1"):
            return 0.0, self.rejection_max
        low = self.rejection_min
        return 1.0 / self.rejection_max if low is None else low, self.rejection_max

    @property
    def folds_correction(self) -> bool:
        """Whether the surrogate takes the correction into its own weight."""
        return self.rule.context == "log_weight"

    @property
    def needs_sampler(self) -> bool:
        return self.correction != "none" or self.rejection != "none"

    @property
    def separable(self) -> bool:
        """Whether a token's gradient needs nothing of other tokens that depends on the policy.

        Given old_logps: what compares them with sampler_logps is known beforehand.
        """
        return (
            self.ratio_level in ("none", "token")
            and self.rule.context is None
            and self.off_policy_mask_threshold is None
            and self.top_entropy_quantile == 1.0
        )

    @property
    def corrects_sequences(self) -> bool:
        """Whether a correction or rejection decides by sequence."""
        return CORRECTIONS[self.correction][0] or self.rejection.startswith("seq")

    @property
    def zero_advantage_is_inert(self) -> bool:
        """Whether a token with advantage 0 is known to have no gradient before it is scored."""
        return self.separable and self.rule.inert and self.beta == 0 and self.entropy_coef == 0

    @property
    def compares_sequences(self) -> bool:
        """Whether a token's loss depends on other sequences of its call, beyond the denominator."""
        return self.rule.context in BATCH_CONTEXTS or self.top_entropy_quantile < 1

    @property
    def zero_advantage_sequence_is_inert(self) -> bool:
        """Whether a sequence whose advantages are all 0 has neither loss nor gradient.

        Nor do the others change without it, given the denominator.
        """
        added = self.beta != 0 or self.entropy_coef != 0
        return self.rule.inert and not self.compares_sequences and not added
