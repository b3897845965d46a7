"""The losses of TRL 1.16: the settings of each in `GRPOConfig` and in `LossConfig`."""

from __future__ import annotations

from trl_source import L_MAX

TOKENS = {"aggregation": "token_mean"}
SEQUENCE = {"ratio_level": "sequence"}
FIXED = {"aggregation": "fixed_length", "max_completion_length": L_MAX}
LUSPO = {"aggregation": "sequence_sum"}
CISPO = {"surrogate": "cispo_raw", "epsilon_high": 1.2, **TOKENS}
VESPO = {"surrogate": "vespo", "log_ratio_clamp": 20.0, **TOKENS}
GSPO = {"importance_sampling_level": "sequence"}
CLIP = {"epsilon": 0.1, "epsilon_high": 0.05}
CLIPPED = {"epsilon_low": 0.1, "epsilon_high": 0.05}
PLAIN_KL = {"beta": 0.3, "use_bias_correction_kl": False}
CORRECTED_KL = {"beta": 0.3, "kl_gradient": "importance"}
OPSM = {"off_policy_mask_threshold": 0.05}
QUANTILE = {"top_entropy_quantile": 0.3}


def vllm(mode, low, high):
    return {
        "use_vllm": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }


def corrected(name, low, high):
    return {"correction": name, "correction_min": low, "correction_max": high}


# What is given to GRPOConfig, and to LossConfig.
CASES = {
    "grpo": ({"loss_type": "grpo"}, {}),
    "bnpo": ({"loss_type": "bnpo"}, TOKENS),
    "dapo": ({"loss_type": "dapo"}, TOKENS),
    "dr_grpo": ({"loss_type": "dr_grpo"}, FIXED),
    "sapo": ({"loss_type": "sapo"}, {"surrogate": "sapo"}),
    "luspo": ({"loss_type": "luspo"}, LUSPO),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, CISPO),
    "vespo": ({"loss_type": "vespo"}, VESPO),
    # At the level of the sequence
    "grpo, sequence": ({"loss_type": "grpo", **GSPO}, SEQUENCE),
    "bnpo, sequence": ({"loss_type": "bnpo", **GSPO}, {**TOKENS, **SEQUENCE}),
    "dapo, sequence": ({"loss_type": "dapo", **GSPO}, {**TOKENS, **SEQUENCE}),
    "dr_grpo, sequence": ({"loss_type": "dr_grpo", **GSPO}, {**FIXED, **SEQUENCE}),
    "sapo, sequence": ({"loss_type": "sapo", **GSPO}, {"surrogate": "sapo", **SEQUENCE}),
    "luspo, sequence": ({"loss_type": "luspo", **GSPO}, {**LUSPO, **SEQUENCE}),
    "cispo, sequence": (
        {"loss_type": "cispo", "epsilon_high": 1.02, **GSPO},
        {**CISPO, "epsilon_high": 1.02, **SEQUENCE},
    ),
    # Bounds
    "grpo, asymmetric": ({"loss_type": "grpo", **CLIP}, CLIPPED),
    "gspo, asymmetric": (
        {"loss_type": "grpo", **GSPO, **CLIP},
        {**SEQUENCE, **CLIPPED},
    ),
    "grpo, delta": ({"loss_type": "grpo", "delta": 1.4}, {"delta": 1.4}),
    "grpo, delta below the clip": ({"loss_type": "grpo", "delta": 1.1}, {"delta": 1.1}),
    "luspo, sequence, delta": (
        {"loss_type": "luspo", **GSPO, "delta": 1.3},
        {**LUSPO, **SEQUENCE, "delta": 1.3},
    ),
    "grpo, temperature": ({"loss_type": "grpo", "temperature": 0.75}, {}),
    "sapo, temperatures": (
        {"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
        {"surrogate": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
    ),
    "vespo, shapes": (
        {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_neg": 1.0},
        {**VESPO, "vespo_k_pos": 1.5, "vespo_lambda_neg": 1.0},
    ),
    # KL
    "grpo, kl": ({"loss_type": "grpo", **PLAIN_KL}, {"beta": 0.3}),
    "dapo, kl": ({"loss_type": "dapo", **PLAIN_KL}, {**TOKENS, "beta": 0.3}),
    "gspo, kl": ({"loss_type": "grpo", **GSPO, **PLAIN_KL}, {**SEQUENCE, "beta": 0.3}),
    "luspo, kl": ({"loss_type": "luspo", **PLAIN_KL}, {**LUSPO, "beta": 0.3}),
    "luspo, sequence, kl": (
        {"loss_type": "luspo", **GSPO, **PLAIN_KL},
        {**LUSPO, **SEQUENCE, "beta": 0.3},
    ),
    "cispo, kl": (
        {"loss_type": "cispo", "epsilon_high": 1.2, **PLAIN_KL},
        {**CISPO, "beta": 0.3},
    ),
    "sapo, kl": ({"loss_type": "sapo", **PLAIN_KL}, {"surrogate": "sapo", "beta": 0.3}),
    "vespo, kl": ({"loss_type": "vespo", **PLAIN_KL}, {**VESPO, "beta": 0.3}),
    "grpo, corrected kl": ({"loss_type": "grpo", "beta": 0.3}, CORRECTED_KL),
    "vespo, corrected kl": ({"loss_type": "vespo", "beta": 0.3}, {**VESPO, **CORRECTED_KL}),
    "dr_grpo, corrected kl, delta": (
        {"loss_type": "dr_grpo", "beta": 0.3, "delta": 1.4},
        {**FIXED, **CORRECTED_KL, "delta": 1.4},
    ),
    "gspo, corrected kl": (
        {"loss_type": "grpo", **GSPO, "beta": 0.3},
        {**SEQUENCE, **CORRECTED_KL},
    ),
    "luspo, sequence, corrected kl": (
        {"loss_type": "luspo", **GSPO, "beta": 0.3},
        {**LUSPO, **SEQUENCE, **CORRECTED_KL},
    ),
    "cispo, corrected kl": (
        {"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.3},
        {**CISPO, **CORRECTED_KL},
    ),
    "sapo, corrected kl": (
        {"loss_type": "sapo", "beta": 0.3},
        {"surrogate": "sapo", **CORRECTED_KL},
    ),
    # Masks on the policy loss
    "grpo, top entropy": ({"loss_type": "grpo", **QUANTILE}, QUANTILE),
    "dapo, top entropy, kl": (
        {"loss_type": "dapo", **QUANTILE, **PLAIN_KL},
        {**TOKENS, **QUANTILE, "beta": 0.3},
    ),
    "luspo, sequence, top entropy": (
        {"loss_type": "luspo", **GSPO, **QUANTILE},
        {**LUSPO, **SEQUENCE, **QUANTILE},
    ),
    "vespo, top entropy": ({"loss_type": "vespo", **QUANTILE}, {**VESPO, **QUANTILE}),
    "grpo, off-policy mask": ({"loss_type": "grpo", **OPSM}, OPSM),
    "gspo, off-policy mask, corrected kl": (
        {"loss_type": "grpo", **GSPO, **OPSM, "beta": 0.3},
        {**SEQUENCE, **OPSM, **CORRECTED_KL},
    ),
    # Sampler correction
    "grpo, token_truncate": (
        {"loss_type": "grpo", **vllm("token_truncate", None, 1.05)},
        corrected("token_tis", None, 1.05),
    ),
    "grpo, token_truncate, both": (
        {"loss_type": "grpo", **vllm("token_truncate", 0.95, 1.05)},
        corrected("token_tis", 0.95, 1.05),
    ),
    "dapo, token_mask, kl": (
        {"loss_type": "dapo", **vllm("token_mask", 0.9, 1.1), **PLAIN_KL},
        {**TOKENS, **corrected("icepop", 0.9, 1.1), "beta": 0.3},
    ),
    "bnpo, sequence_truncate": (
        {"loss_type": "bnpo", **vllm("sequence_truncate", None, 1.05)},
        {**TOKENS, **corrected("sequence_tis", None, 1.05)},
    ),
    "dapo, sequence_mask": (
        {"loss_type": "dapo", **vllm("sequence_mask", None, 1.4)},
        {**TOKENS, **corrected("sequence_mis", None, 1.4)},
    ),
    "gspo, sequence_mask, both": (
        {"loss_type": "grpo", **GSPO, **vllm("sequence_mask", 0.9, 1.5)},
        {**SEQUENCE, **corrected("sequence_mis", 0.9, 1.5)},
    ),
    "luspo, token_truncate": (
        {"loss_type": "luspo", **GSPO, **vllm("token_truncate", None, 1.05)},
        {**LUSPO, **SEQUENCE, **corrected("token_tis", None, 1.05)},
    ),
    "vespo, token_truncate": (
        {"loss_type": "vespo", **vllm("token_truncate", None, 1.05)},
        {**VESPO, **corrected("token_tis", None, 1.05)},
    ),
    "vespo, token_mask": (
        {"loss_type": "vespo", **vllm("token_mask", 0.79, 1.2)},
        {**VESPO, **corrected("icepop", 0.79, 1.2)},
    ),
    "dapo, everything": (
        {
            "loss_type": "dapo", **CLIP, "delta": 1.5, "beta": 0.3, **OPSM,
            "top_entropy_quantile": 0.8, **vllm("token_mask", 0.9, 1.1),
        },
        {
            **TOKENS, **CLIPPED, "delta": 1.5, **CORRECTED_KL, **OPSM,
            "top_entropy_quantile": 0.8, **corrected("icepop", 0.9, 1.1),
        },
    ),
}  # fmt: skip
GMPO = {"surrogate": "gmpo", "ratio_level": "sequence", "epsilon_low": 0.4, "epsilon_high": 0.4}
GMPO_CASES = {
    "gmpo": ({}, GMPO),
    "gmpo, kl": ({"beta": 0.3}, {**GMPO, "beta": 0.3}),
    "gmpo, asymmetric": (
        {"epsilon": 0.1, "epsilon_high": 0.05},
        {**GMPO, "epsilon_low": 0.1, "epsilon_high": 0.05},
    ),
}
