"""Bad input raises a ValueError that names the argument, what was expected and what was given."""

from __future__ import annotations

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig

B, T, H, V = 2, 3, 4, 5


def loss_arguments(**changes):
    arguments = {
        "hidden": torch.randn(B, T, H),
        "weight": torch.randn(V, H),
        "completion_ids": torch.zeros(B, T, dtype=torch.int64),
        "completion_mask": torch.ones(B, T, dtype=torch.bool),
        "advantages": torch.ones(B),
    }
    return {**arguments, **changes}


def packed(**changes):
    return loss_arguments(
        hidden=torch.randn(6, H),
        completion_ids=torch.zeros(6, dtype=torch.int64),
        completion_mask=None,
        **changes,
    )


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32)


LOSS = {
    r"hidden: expected shape \(B, T, H\), got \(6, 4\)": dict(hidden=torch.randn(6, H)),
    "hidden: expected dtype": dict(hidden=torch.zeros(B, T, H, dtype=torch.int64)),
    "hidden: expected a tensor, got list": dict(hidden=[1.0]),
    r"weight: expected shape \(V, 4\).* got \(5, 3\)": dict(weight=torch.randn(V, 3)),
    r"weight: expected shape .* got \(0,\) .*shard": dict(weight=torch.randn(0)),
    "weight: expected dtype float32, got torch.bfloat16": dict(weight=torch.randn(V, H).bfloat16()),
    "weight: expected a tensor on cpu, got one on meta": dict(weight=torch.randn(V, H).to("meta")),
    r"completion_ids: expected shape \(2, 3\), got \(2, 4\)": dict(
        completion_ids=torch.zeros(B, 4, dtype=torch.int64)
    ),
    "completion_ids: expected dtype int64": dict(
        completion_ids=torch.zeros(B, T, dtype=torch.int32)
    ),
    r"completion_ids: expected ids in \[0, 5\) .* got 5": dict(
        completion_ids=torch.full((B, T), V)
    ),
    "completion_ids: expected ids in .* got -1": dict(completion_ids=torch.full((B, T), -1)),
    "completion_mask: expected a bool tensor": dict(completion_mask=None),
    "completion_mask: expected dtype bool": dict(completion_mask=torch.ones(B, T)),
    r"completion_mask: expected shape \(2, 3\)": dict(
        completion_mask=torch.ones(B, dtype=torch.bool)
    ),
    r"advantages: expected shape \(2,\) or \(2, 3\), got \(3,\)": dict(advantages=torch.ones(3)),
    r"old_logps: expected shape \(2, 3\), got \(2,\)": dict(old_logps=torch.ones(B)),
    "ref_logps: expected a tensor": dict(ref_logps=[0.0]),
    "sampler_logps: expected dtype": dict(sampler_logps=torch.ones(B, T, dtype=torch.int64)),
    "ref_logps: expected log-probs as beta is 0.1, got None": dict(config=LossConfig(beta=0.1)),
    "config: expected one of .* got 'ppo2'": dict(config="ppo2"),
    "config: expected a preset's name or a LossConfig": dict(config=3),
    "max_completion_length: expected a length .* or a normalizer": dict(config="dr_grpo"),
    "temperature: expected a number > 0, got 0.0": dict(temperature=0.0),
    "temperature: expected a number > 0, got -1": dict(temperature=-1),
    "temperature: expected a finite number, got nan": dict(temperature=float("nan")),
    r"temperature: expected shape \(2, 3\)": dict(temperature=torch.ones(B)),
    "temperature: expected values > 0 .* got nan": dict(temperature=torch.full((B, T), torch.nan)),
    "temperature: expected values > 0 .* got 0.0": dict(temperature=torch.zeros(B, T)),
    "logit_scale: expected a finite number": dict(logit_scale=float("inf")),
    "softcap: expected a number > 0": dict(softcap=0.0),
    r"bias: expected shape \(5,\), got \(4,\)": dict(bias=torch.zeros(4)),
    "normalizer: expected a number > 0, got 0": dict(normalizer=0),
    "normalizer: expected a number > 0, got -2.0": dict(normalizer=torch.tensor(-2.0)),
    r"normalizer: expected shape \(\)": dict(normalizer=torch.ones(1)),
    "workspace_mb: expected a number of MiB > 0": dict(workspace_mb=0),
    r"workspace_mb: expected at least .* one row of 5 logits; got 1e-06": dict(workspace_mb=1e-6),
    "backend: expected one of .* got 'cuda'": dict(backend="cuda"),
    r"sparsity: expected 0 or a number in \[1e-6, 1\), got 1": dict(sparsity=1),
    "sparsity: expected 0 or a number .* got 1e-320": dict(sparsity=1e-320),
    "sparsity: expected a finite number.*got -0.1": dict(sparsity=-0.1),
    "sparsity: expected a finite number.*got nan": dict(sparsity=float("nan")),
    "skip_zero_advantage: expected a bool, got 'no'": dict(skip_zero_advantage="no"),
    "skip_zero_advantage: expected a loss": dict(config="gspo", skip_zero_advantage=True),
    "skip_zero_advantage has no effect with entropy": dict(
        config=LossConfig(entropy="differentiable"), skip_zero_advantage=True
    ),
    "skip_zero_advantage: expected old_logps": dict(
        config=LossConfig(correction="sequence_mis"),
        sampler_logps=torch.zeros(B, T),
        skip_zero_advantage=True,
    ),
    "seed has no effect with surrogate='ppo_clip' and sparsity=0": dict(seed=1),
    "seed: expected an int, got 1.5": dict(config="clip_cov", seed=1.5),
    "seed: expected an int of 63 bits": dict(sparsity=0.1, seed=2**63),
    "sampler_logps: expected log-probs as correction is 'sequence_mis'": dict(config="trl_dapo"),
    "off_policy_mask_threshold has no effect without": dict(
        config=LossConfig(off_policy_mask_threshold=0.1)
    ),
    "entropy_threshold has no effect with top_entropy_quantile=1": dict(entropy_threshold=1.0),
    "group_ids_or_size has no effect with aggregation='sequence_mean'": dict(group_ids_or_size=2),
    "group_ids_or_size: expected ids or a size": dict(config=LossConfig(aggregation="prompt_mean")),
    "group_ids_or_size: expected a divisor of the 2 completions": dict(
        config=LossConfig(aggregation="prompt_mean"), group_ids_or_size=3
    ),
    "normalizer has no effect with aggregation='token_sum'": dict(
        config="importance_sampling", normalizer=3
    ),
    "logit_scale: expected a number that fp32 can hold, got 1e[+]39": dict(logit_scale=1e39),
    "softcap: expected a number that fp32 can hold": dict(softcap=1e39),
    "temperature: expected a number that fp32 can hold": dict(temperature=1e300),
    "temperature: expected a number that fp32 can hold, got 1000": dict(temperature=10**400),
    "temperature: expected a number whose inverse fp32 can hold": dict(temperature=1e-40),
    "temperature: expected values > 0 .* got 1e-40": dict(
        hidden=torch.randn(B, T, H).double(),
        weight=torch.randn(V, H).double(),
        temperature=torch.full((B, T), 1e-40, dtype=torch.float64),
    ),
    "normalizer: expected a number that fp32 can hold": dict(normalizer=1e50),
    "normalizer: expected a number > 0, got 1e.50": dict(
        normalizer=torch.tensor(1e50, dtype=torch.float64)
    ),
    "normalizer: expected a number, got a bool": dict(normalizer=torch.tensor(True)),
    "entropy_threshold: expected a finite number, got nan": dict(
        config=LossConfig(top_entropy_quantile=0.5), entropy_threshold=torch.tensor(torch.nan)
    ),
    "old_logps: expected log-probs .* got positive numbers only": dict(
        old_logps=torch.rand(B, T) + 0.01
    ),
    "seed: expected an int of 63 bits, got 9": dict(config="clip_cov", seed=2**63),
    r"hidden: expected shape \(..., H\), H >= 1": dict(
        hidden=torch.randn(B, T, 0), weight=torch.randn(V, 0)
    ),
}
PACKED = {
    r"cu_seqlens: .*from 0 to N = 6, got \[0, 2, 5\]": dict(cu_seqlens=bounds(0, 2, 5)),
    r"cu_seqlens: .* got \[1, 2, 6\]": dict(cu_seqlens=bounds(1, 2, 6)),
    r"cu_seqlens: .* got \[0, 7, 6\]": dict(cu_seqlens=bounds(0, 7, 6)),
    "cu_seqlens: expected dtype": dict(cu_seqlens=torch.tensor([0.0, 2.0, 6.0])),
    r"cu_seqlens: expected shape \(B \+ 1,\)": dict(cu_seqlens=bounds(0, 2, 6)[None]),
    r"advantages: expected shape \(3,\) or \(6,\), got \(2,\)": dict(cu_seqlens=bounds(0, 2, 4, 6)),
    "advantages: expected a shape that tells sequences from tokens, got 6 for as many": dict(
        cu_seqlens=bounds(0, 0, 2, 3, 4, 5, 6), advantages=torch.ones(6)
    ),
}


@pytest.mark.parametrize("message", LOSS)
def test_grpo_loss(message):
    with pytest.raises(ValueError, match=message):
        fastgrpo.grpo_loss(**loss_arguments(**LOSS[message]))


@pytest.mark.parametrize("message", PACKED)
def test_packed_grpo_loss(message):
    with pytest.raises(ValueError, match=message):
        fastgrpo.grpo_loss(**packed(**PACKED[message]))


LOGPS = {
    r"hidden: expected shape \(..., H\)": dict(hidden=torch.randn(H)),
    r"token_ids: expected shape \(2,\)": dict(token_ids=torch.zeros(3, dtype=torch.int64)),
    r"token_ids: expected ids in \[0, 5\)": dict(token_ids=torch.tensor([0, 7])),
    "entropy: expected one of": dict(entropy="yes"),
    "old_logps has no effect": dict(old_logps=torch.zeros(2)),
    "ignore_index: expected an int of 64 bits, got None": dict(ignore_index=None),
    "ignore_index: expected an int of 64 bits, got -100.0": dict(ignore_index=-100.0),
    "ignore_index: expected an int of 64 bits, got True": dict(ignore_index=True),
    "ignore_index: expected an int of 64 bits, got 1000": dict(ignore_index=10**30),
}


@pytest.mark.parametrize("message", LOGPS)
def test_linear_logps(message):
    arguments = {
        "hidden": torch.randn(2, H),
        "weight": torch.randn(V, H),
        "token_ids": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        fastgrpo.linear_logps(**{**arguments, **LOGPS[message]})


CONFIGS = {
    "delta: expected a number that fp32 can hold, got 1e[+]40": dict(delta=1e40),
    "epsilon_high: expected a number that fp32 can hold": dict(epsilon_high=1e39),
    "correction_max: expected a number that fp32": dict(correction="icepop", correction_max=1e40),
    "kl_input_clamp: expected a number that fp32": dict(beta=0.1, kl_input_clamp=1e40),
    "cov_ratio=0.1 has no effect with kl_cov_coef=0": dict(
        surrogate="kl_cov", kl_cov_coef=0.0, cov_ratio=0.1
    ),
    "LossConfig has no field 'epsilon'": dict(epsilon=0.2),
    "surrogate: expected one of": dict(surrogate="ppo"),
    "ratio_level: expected one of .'token'. with surrogate='dro', got 'sequence'": dict(
        surrogate="dro", ratio_level="sequence"
    ),
    "aggregation: expected one of": dict(aggregation="mean"),
    "kl: expected one of": dict(kl="k9"),
    "entropy: expected one of": dict(entropy=True),
    "epsilon_low: expected a finite number": dict(epsilon_low=1.5),
    "epsilon_high: expected a finite number": dict(epsilon_high=-0.1),
    "beta: expected a finite number": dict(beta="0.1"),
    "entropy_coef: expected a finite number": dict(entropy_coef=float("nan")),
    "delta: expected a number > 0": dict(delta=-1.0),
    "delta=2.0 has no effect with surrogate='cispo'": dict(surrogate="cispo", delta=2.0),
    "epsilon_high=0.3 has no effect with surrogate='reinforce'": dict(
        surrogate="reinforce", ratio_level="none", epsilon_high=0.3
    ),
    "max_completion_length=9 has no effect with aggregation='seq": dict(max_completion_length=9),
    "vespo_k_pos=1.0 has no effect with surrogate='ppo_clip'": dict(vespo_k_pos=1.0),
    "anchor='sampler' has no effect with ratio_level='none'": dict(
        surrogate="reinforce", ratio_level="none", anchor="sampler"
    ),
    "log_ratio_clamp=20.0 has no effect with ratio_level='none'": dict(
        surrogate="reinforce", ratio_level="none", log_ratio_clamp=20.0
    ),
    "correction_max=2.0 has no effect with correction='none'": dict(correction_max=2.0),
    "rejection_max=2.0 has no effect with rejection='none'": dict(rejection_max=2.0),
    "rejection_min=0.5 has no effect with rejection='token_k3'": dict(
        rejection="token_k3", rejection_max=1.0, rejection_min=0.5
    ),
    "rejection_max: expected a bound as rejection is 'seq_sum_k1'": dict(rejection="seq_sum_k1"),
    "rejection_max: expected at least 1, or a rejection_min; got 0.5": dict(
        rejection="token_k1", rejection_max=0.5
    ),
    "rejection_min: expected at most rejection_max=0.5; got 0.7": dict(
        rejection="token_k1", rejection_max=0.5, rejection_min=0.7
    ),
    "kl_gradient: expected 'value'.* with surrogate='gmpo'": dict(
        surrogate="gmpo", ratio_level="sequence", beta=0.1, kl_gradient="importance"
    ),
    "proximal_coef: expected a number > 0 with 'dro'; got 0.0": dict(surrogate="dro"),
    "log_ratio_clamp: expected None with 'dro'": dict(
        surrogate="dro", proximal_coef=0.1, log_ratio_clamp=20.0
    ),
    "kl='k1' has no effect with beta=0": dict(kl="k1"),
    "kl_gradient='importance' has no effect with beta=0": dict(kl_gradient="importance"),
    "kl_gradient='importance' has no effect with ratio_level='none'": dict(
        surrogate="reinforce", ratio_level="none", kl_gradient="importance", beta=0.1
    ),
    "kl_gradient='straight_through' has no effect with kl='k2'": dict(
        kl="k2", kl_gradient="straight_through", beta=0.1
    ),
    "correction: expected 'none' with anchor='sampler'": dict(
        anchor="sampler", correction="token_tis"
    ),
    "correction: expected one of .* got 'sequence_tis'": dict(
        surrogate="vespo", correction="sequence_tis"
    ),
    "correction_min: expected at most correction_max=2.0, got 3.0": dict(
        correction="token_tis", correction_min=3.0
    ),
    "epsilon_high: expected a bound > 1 on the ratio itself": dict(surrogate="cispo_raw"),
    "top_entropy_quantile: expected a share": dict(top_entropy_quantile=0.0),
    "cov_low: expected less than cov_high=0.5": dict(surrogate="clip_cov", cov_high=0.5),
    "correction: expected one of": dict(correction="tis"),
    "surrogate: expected one of .* got 'mine'; .* the module that calls register_surrogate": dict(
        surrogate="mine"
    ),
    r"surrogate_parameters: expected nothing with surrogate='ppo_clip', whose .* fields "
    r"\['epsilon_low', 'epsilon_high', 'delta'\] .* got \{'epsilon_low': 0.1\}": dict(
        surrogate_parameters={"epsilon_low": 0.1}
    ),
    "surrogate_parameters: expected nothing with surrogate='reinforce'.* got None": dict(
        surrogate="reinforce", ratio_level="none", surrogate_parameters=None
    ),
    "rejection: expected one of": dict(rejection="seq_max_k1"),
    "max_completion_length: expected an int": dict(
        aggregation="fixed_length", max_completion_length=0
    ),
}


@pytest.mark.parametrize("message", CONFIGS)
def test_loss_config(message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**CONFIGS[message])


def test_presets_take_overrides_and_refuse_unknown_names():
    assert LossConfig.preset("dapo", epsilon_high=0.3).epsilon_high == 0.3
    assert LossConfig.preset("grpo") == LossConfig()
    with pytest.raises(ValueError, match="config: expected one of .* got 'GRPO'"):
        LossConfig.preset("GRPO")
    with pytest.raises(ValueError, match="no field 'eps'"):
        LossConfig.preset("grpo", eps=0.1)
    with pytest.raises(ValueError, match=r"pass LossConfig\(surrogate='ppo_clip'\)"):
        LossConfig.preset("ppo_clip")


def test_the_module_refuses_what_the_function_does_not_take():
    with pytest.raises(ValueError, match="temprature: expected an option of grpo_loss"):
        fastgrpo.FusedGRPOLoss("dapo", temprature=0.5)
    with pytest.raises(ValueError, match="config: expected a preset's name or a LossConfig"):
        fastgrpo.FusedGRPOLoss({"surrogate": "ppo_clip"})


def test_a_backend_never_falls_back():
    from fastgrpo_kernels.runtime import INTERPRETED

    if INTERPRETED:
        pytest.skip("backend='triton' runs on a CPU in this process")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        fastgrpo.grpo_loss(**loss_arguments(backend="triton"))


def test_triton_does_not_take_float64():
    arguments = loss_arguments(backend="triton")
    arguments["hidden"] = arguments["hidden"].double()
    with pytest.raises(ValueError, match="hidden: expected dtype"):
        fastgrpo.grpo_loss(**arguments)


def test_checked_turns_value_checks_on_and_off_again():
    from fastgrpo import checks

    gpu = torch.empty(1, device="meta")
    assert checks.looks_at_values(torch.empty(1)) and not checks.looks_at_values(gpu)
    with fastgrpo.checked():
        assert checks.looks_at_values(gpu)
    assert not checks.looks_at_values(gpu)
