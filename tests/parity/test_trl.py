"""Every loss of TRL 1.16, computed by TRL's own `_compute_loss`, on the same model and batch.

A trainer is built from each `GRPOConfig`; its loss and the gradients of all parameters are compared
with those of `grpo_loss` on the model's hidden states. Twice: in float32, with nothing of TRL
replaced, and in float64, where only its float32 LM head is, so that the bar leaves no room for a
different formula.
"""

from __future__ import annotations

import re

import pytest
import torch

from fastgrpo import LossConfig

pytest.importorskip("trl", minversion="1.16")

from trl import GRPOConfig  # noqa: E402
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # noqa: E402

from tests.parity.trl_source import (  # noqa: E402
    L_MAX,
    assert_same,
    errors,
    exact_logps,
    make_setting,
    our_loss,
    trl_loss,
    trl_trainer,
)

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


@pytest.mark.parametrize("case", CASES)
def test_every_loss(case, setting, dtype, tmp_path):
    given, wanted = CASES[case]
    trainer = trl_trainer(setting, tmp_path, **given)
    ours = our_loss(setting, LossConfig(**wanted), trainer.temperature)
    assert_same(trl_loss(trainer, setting), ours, dtype)


@pytest.mark.parametrize("case", GMPO_CASES)
def test_gmpo(case, dtype, tmp_path):
    given, wanted = GMPO_CASES[case]
    setting = make_setting(dtype, empty=False)
    trainer = trl_trainer(setting, tmp_path, trainer=GMPOTrainer, **given)
    assert_same(trl_loss(trainer, setting), our_loss(setting, LossConfig(**wanted)), dtype)


def test_the_table_has_every_loss_type():
    """Those that TRL's help names, between quotes; beside them it names a level."""
    named = re.findall(r"'(\w+)'", GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    assert {given["loss_type"] for given, _ in CASES.values()} == set(named) - {"sequence"}


def test_vespo_bounds_token_log_ratios(setting, dtype, tmp_path):
    """One token 25 nats from the sampler's, others making up for 20 of them."""
    old = exact_logps(*setting)[0].detach() + 20.1 / 8
    old[0, 3] = -25 + old[0, 3] - 20.1 / 8
    far = setting._replace(inputs={**setting.inputs, "old_per_token_logps": old})
    trainer = trl_trainer(far, tmp_path, loss_type="vespo")
    theirs, ours = trl_loss(trainer, far), our_loss(far, LossConfig(**VESPO))
    assert_same(theirs, ours, dtype)
    assert errors(theirs, our_loss(far, LossConfig(**{**VESPO, "log_ratio_clamp": None})))[1] > 0.1


def test_on_policy(setting, dtype, tmp_path):
    """Without old log-probs: the ratio is 1 and has its gradient."""
    inputs = {k: v for k, v in setting.inputs.items() if k != "old_per_token_logps"}
    on_policy = setting._replace(inputs={**inputs, "old_per_token_logps": None})
    for loss_type, config in (("grpo", {}), ("cispo", CISPO), ("vespo", VESPO)):
        trainer = trl_trainer(setting, tmp_path, loss_type=loss_type, epsilon_high=1.2)
        ours = our_loss(on_policy, LossConfig(**config))
        assert_same(trl_loss(trainer, on_policy), ours, dtype)


def test_advantages_per_token(setting, dtype, tmp_path):
    signs = torch.randn(setting.mask.shape, generator=torch.Generator().manual_seed(1))
    inputs = {**setting.inputs, "advantages": signs.to(dtype)}
    per_token = setting._replace(inputs=inputs)
    for loss_type, config in (("dapo", TOKENS), ("sapo", {"surrogate": "sapo"}), ("vespo", VESPO)):
        trainer = trl_trainer(setting, tmp_path, loss_type=loss_type)
        assert_same(trl_loss(trainer, per_token), our_loss(per_token, LossConfig(**config)), dtype)


@pytest.mark.parametrize("loss_type, config, normalizer", [
    # Sequences, times accumulation steps
    ("grpo", {}, 6 * 2),
    ("luspo", {**LUSPO, **SEQUENCE}, 6 * 2),
    ("dr_grpo", FIXED, 6 * L_MAX * 2),
    # 300 tokens in 4 steps' micro-batches, of which 2 are accumulated
    ("dapo", TOKENS, 150),
    ("cispo", {**CISPO, "epsilon_high": 1.2}, 150),
    ("vespo", VESPO, 150),
])  # fmt: skip
def test_normalizer_of_an_accumulated_step(loss_type, config, normalizer, setting, dtype, tmp_path):
    """What TRL divides a micro-batch by is the `normalizer` that it takes to do the same."""
    trainer = trl_trainer(
        setting, tmp_path, loss_type=loss_type, gradient_accumulation_steps=2,
        steps_per_generation=4, epsilon_high=1.2 if loss_type == "cispo" else None,
        importance_sampling_level="sequence" if loss_type == "luspo" else "token",
    )  # fmt: skip
    theirs = trl_loss(trainer, setting, num_items_in_batch=torch.tensor(300.0))
    ours = our_loss(setting, LossConfig(**config), normalizer=normalizer)
    assert_same(theirs, ours, dtype)


def test_bnpo_accumulates_means_of_micro_batches(setting, dtype, tmp_path):
    """Its denominator is local by design: times the accumulation steps."""
    trainer = trl_trainer(setting, tmp_path, loss_type="bnpo", gradient_accumulation_steps=2)
    tokens = setting.mask.sum().item()
    ours = our_loss(setting, LossConfig(**TOKENS), normalizer=2 * tokens)
    assert_same(trl_loss(trainer, setting), ours, dtype)


@pytest.mark.parametrize("case", ["grpo, asymmetric", "dapo", "grpo, kl", "grpo, top entropy"])
def test_metrics_of_tokens(case, setting, dtype, tmp_path):
    given, wanted = CASES[case]
    trainer = trl_trainer(setting, tmp_path, **given)
    trl_loss(trainer, setting)
    out, _ = our_loss(setting, LossConfig(**wanted, entropy="detached"))
    assert_same_metrics(trainer, out)


@pytest.mark.parametrize("case", GMPO_CASES)
def test_metrics_of_gmpo(case, dtype, tmp_path):
    given, wanted = GMPO_CASES[case]
    setting = make_setting(dtype, empty=False)
    trainer = trl_trainer(setting, tmp_path, trainer=GMPOTrainer, **given)
    trl_loss(trainer, setting)
    out, _ = our_loss(setting, LossConfig(**wanted, entropy="detached"))
    assert_same_metrics(trainer, out)


def assert_same_metrics(trainer, out):
    theirs = trainer._metrics["train"]
    names = {"clip_ratio/low_mean": "clip_low", "clip_ratio/high_mean": "clip_high"}
    names |= {"clip_ratio/region_mean": "clip_region", "entropy": "entropy"}
    if trainer.beta:
        names["kl"] = "kl"
    for name, ours in names.items():
        assert theirs[name][-1] > 0
        assert out.metrics[ours].item() == pytest.approx(theirs[name][-1], rel=1e-5)


@pytest.mark.parametrize("name, given", [
    ("grpo", {"loss_type": "grpo"}),
    ("bnpo", {"loss_type": "bnpo"}),
    ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}),
    ("dapo_paper", {"loss_type": "dapo", "epsilon_high": 0.28}),
    ("gspo", {"loss_type": "grpo", **GSPO, "epsilon": 3e-4, "epsilon_high": 4e-4}),
    ("luspo", {"loss_type": "luspo", **GSPO}),
    ("sapo", {"loss_type": "sapo"}),
    ("vespo", {"loss_type": "vespo"}),
    ("cispo_raw", {"loss_type": "cispo", "epsilon_high": 5.0}),
    ("cispo_minimax", {"loss_type": "cispo", "epsilon_high": 5.0}),
    ("dsv32", {"loss_type": "grpo", "beta": 1e-3, "off_policy_mask_threshold": 1e-4}),
    ("trl_grpo", {"loss_type": "grpo", **vllm("sequence_mask", None, 3.0)}),
    ("trl_dapo", {"loss_type": "dapo", **vllm("sequence_mask", None, 3.0)}),
])  # fmt: skip
def test_presets(name, given, setting, dtype, tmp_path):
    ours = our_loss(setting, LossConfig.preset(name))
    assert_same(trl_loss(trl_trainer(setting, tmp_path, **given), setting), ours, dtype)


def test_presets_are_the_defaults(tmp_path):
    """A `GRPOConfig` with nothing set, and one for every loss type."""
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    config = LossConfig.preset("trl_dapo")
    assert (args.loss_type, config.aggregation) == ("dapo", "token_mean")
    assert (args.importance_sampling_level, config.ratio_level) == ("token", "token")
    assert args.vllm_importance_sampling_mode == "sequence_mask"
    assert config.correction == "sequence_mis"
    assert args.vllm_importance_sampling_clip_min is None
    assert config.correction_bounds == (0.0, args.vllm_importance_sampling_clip_max)
    assert args.epsilon == config.epsilon_low == config.epsilon_high
    assert args.epsilon_high is None and args.delta is config.delta is None
    assert args.beta == config.beta == 0
    assert args.entropy_coef == config.entropy_coef == 0
    assert args.top_entropy_quantile == config.top_entropy_quantile == 1
    assert args.off_policy_mask_threshold is config.off_policy_mask_threshold is None
    assert LossConfig.preset("trl_grpo") == LossConfig.preset(
        "trl_dapo", **{"aggregation": "sequence_mean"}
    )
    for name in ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos",
                 "vespo_k_neg", "vespo_lambda_neg"):  # fmt: skip
        assert getattr(args, name) == getattr(config, name)
    gmpo = GMPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert gmpo.epsilon_high is None
    assert gmpo.epsilon == LossConfig.preset("gmpo").epsilon_low
    assert gmpo.epsilon == LossConfig.preset("gmpo").epsilon_high
