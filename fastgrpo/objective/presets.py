"""Names for losses: papers' and trainers', with the defaults of the source each one is named after.

Under the first heading the surrogates' own names; under the second what a trainer runs when nothing
is configured, for parity. docs/losses.md has formulas and sources.
"""

from __future__ import annotations

_GSPO = dict(epsilon_low=3e-4, epsilon_high=4e-4)
_KIMI_KL = 2e-3  # prime-rl's kl_tau = 1e-3 multiplies the square, proximal_coef half of it

PRESETS: dict[str, dict[str, object]] = {
    # ---- losses ----------------------------------------------------------------------------------
    "reinforce": dict(surrogate="reinforce", ratio_level="none", aggregation="token_mean"),
    # -w log p: its weights are passed as advantages.
    "nll": dict(surrogate="reinforce", ratio_level="none", aggregation="token_mean"),
    # The two differ in their advantages: a critic's, or the group's.
    "ppo": dict(),
    "grpo": dict(),
    "bnpo": dict(aggregation="token_mean"),
    "dapo": dict(aggregation="token_mean", epsilon_high=0.28),
    "dr_grpo": dict(aggregation="fixed_length"),
    "gspo": dict(ratio_level="sequence", **_GSPO),
    "gspo_token": dict(ratio_level="sequence_token", **_GSPO),
    "luspo": dict(ratio_level="sequence", aggregation="sequence_sum"),
    "gmpo": dict(surrogate="gmpo", ratio_level="sequence", epsilon_low=0.4, epsilon_high=0.4),
    "cispo": dict(surrogate="cispo", aggregation="token_mean"),
    "cispo_raw": dict(surrogate="cispo_raw", aggregation="token_mean", epsilon_high=5.0),
    "sapo": dict(surrogate="sapo"),
    "vespo": dict(surrogate="vespo", aggregation="token_mean", log_ratio_clamp=20.0),
    "dppo_tv": dict(surrogate="dppo_tv", aggregation="token_mean", delta=20.0),
    "dppo_kl": dict(surrogate="dppo_kl", aggregation="token_mean", delta=20.0),
    "prime_dppo": dict(
        surrogate="prime_dppo", anchor="sampler", aggregation="token_mean", proximal_coef=_KIMI_KL
    ),
    "ipo": dict(
        surrogate="ipo",
        anchor="sampler",
        aggregation="token_mean",
        epsilon_low=0.1,
        epsilon_high=0.1,
        proximal_coef=_KIMI_KL,
    ),
    "dro": dict(surrogate="dro", aggregation="token_mean", proximal_coef=0.1),
    "clip_cov": dict(surrogate="clip_cov", aggregation="token_mean"),
    "kl_cov": dict(surrogate="kl_cov", aggregation="token_mean"),
    # [0, 1] as offsets from 1.
    "tis_pg": dict(surrogate="cispo", epsilon_low=1.0, epsilon_high=0.0),
    "topr": dict(surrogate="topr"),
    "importance_sampling": dict(surrogate="importance_sampling", aggregation="token_sum"),
    "fipo": dict(surrogate="fipo", aggregation="token_mean"),
    # ---- trainers' defaults ----------------------------------------------------------------------
    "lmbook": dict(beta=0.1),
    "trl_grpo": dict(correction="sequence_mis", correction_max=3.0),
    "trl_dapo": dict(aggregation="token_mean", correction="sequence_mis", correction_max=3.0),
    "verl_default": dict(aggregation="token_mean", delta=3.0, log_ratio_clamp=20.0),
    "nemo_grpo": dict(
        aggregation="token_mean",
        beta=0.01,
        kl_gradient="score_function",
        kl_input_clamp=20.0,
        kl_output_clamp=10.0,
    ),
    "openrlhf_rf++": dict(aggregation="token_mean", log_ratio_clamp=20.0),
    "cispo_minimax": dict(surrogate="cispo_raw", aggregation="token_mean", epsilon_high=5.0),
    "dapo_paper": dict(aggregation="token_mean", epsilon_high=0.28),
    # beta is verl's kl_loss_coef and the threshold slime's: the paper prints neither.
    "dsv32": dict(beta=1e-3, kl_gradient="importance", off_policy_mask_threshold=1e-4),
}
