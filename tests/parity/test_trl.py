"""Every loss of TRL 1.16, computed by TRL's own `_compute_loss`, on the same model and batch.

A trainer is built from each `GRPOConfig`. Its loss and the gradients of all parameters are compared
with those of `grpo_loss` on the model's hidden states. This is done twice: in float32, with TRL
unchanged, and in float64, with only its float32 LM head replaced. The bar of the second comparison
leaves no room for a different formula.
"""

from __future__ import annotations

import re

import pytest
import torch

from fastgrpo import LossConfig

pytest.importorskip("trl", minversion="1.16")

from trl import GRPOConfig  # noqa: E402
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # noqa: E402

from trl_cases import (  # noqa: E402
    CASES,
    CISPO,
    FIXED,
    GMPO_CASES,
    GSPO,
    LUSPO,
    SEQUENCE,
    TOKENS,
    VESPO,
    vllm,
)
from trl_source import (  # noqa: E402
    L_MAX,
    assert_same,
    errors,
    exact_logps,
    make_setting,
    our_loss,
    trl_loss,
    trl_trainer,
)


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
