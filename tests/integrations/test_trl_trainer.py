"""`FastGRPOTrainer` beside TRL's `GRPOTrainer`: losses, gradients, every metric that is logged."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")
pytest.importorskip("peft")

import trl  # noqa: E402
from peft import LoraConfig, PromptTuningConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GraniteConfig,
    PhiConfig,
    Qwen3MoeConfig,
)
from trl import GRPOTrainer  # noqa: E402
from trl.trainer import utils  # noqa: E402

from fastgrpo.integrations.trl import FastGRPOTrainer, chunked_head, fused_loss  # noqa: E402
from fastgrpo.integrations.trl.settings import (  # noqa: E402
    CORRECTIONS,
    LOSS_TYPES,
    NO_BOUND,
    NotFused,
    loss_config,
)
from fastgrpo.testing import relative_error  # noqa: E402
from trl_cases import CASES, vllm  # noqa: E402
from trl_runs import LORA, grpo, logged, prompts  # noqa: E402
from trl_source import exact_logps, make_setting, trl_loss, trl_trainer  # noqa: E402

SEVERAL_UPDATES = {"beta": 0.04, "num_iterations": 3, "gradient_accumulation_steps": 2}


@pytest.fixture(autouse=True)
def fused_calls(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the hidden states that `grpo_loss` takes. Nothing is said before the test."""
    chunked_head.say_once.cache_clear()
    seen, original = [], fused_loss.grpo_loss

    def spy(hidden, *args, **kwargs):
        seen.append(tuple(hidden.shape))
        return original(hidden, *args, **kwargs)

    monkeypatch.setattr(fused_loss, "grpo_loss", spy)
    return seen


def run(trainer, folder, output, **settings):
    made = grpo(trainer, folder, output, **settings)
    made.train()
    return made


def same_runs(folder, output, **settings):
    """Train both; compare what they log at every step. Return what TRL logs."""
    stock = run(GRPOTrainer, folder, output, **settings)
    ours = run(FastGRPOTrainer, folder, output, **settings)
    return same_logs(stock, ours)


def same_logs(stock, ours):
    """Compare what two trainers logged. Return what TRL's did."""
    wanted, actual = logged(stock), logged(ours)
    assert len(wanted) == stock.args.max_steps
    for theirs, step in zip(wanted, actual, strict=True):
        assert step == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    return wanted


def bound(loss_type):
    """CISPO's upper bound is one on the ratio itself."""
    return {"loss_type": loss_type, "epsilon_high": 1.2 if loss_type == "cispo" else None}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_six_steps(loss_type, folder, tmp_path, fused_calls):
    wanted = same_runs(folder, tmp_path, **bound(loss_type), **SEVERAL_UPDATES)
    assert len(fused_calls) == 6 * 2
    clipped = [entry.get("clip_ratio/region_mean", 1.0) for entry in wanted]
    assert max(clipped) > 0.1 and max(entry["kl"] for entry in wanted) > 0.01
    assert all(entry["grad_norm"] > 0.01 for entry in wanted)


def test_rows_with_a_label(compact, folder, tmp_path, fused_calls):
    same_runs(folder, tmp_path, **SEVERAL_UPDATES)
    assert {len(shape) for shape in fused_calls} == {2 if compact else 3}


@pytest.mark.parametrize("settings", [
    {},
    {"importance_sampling_level": "sequence", "num_iterations": 2, "epsilon": 0.01},
    {"num_iterations": 2, "use_bias_correction_kl": False, "beta": 0.1, "delta": 1.3},
    {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "loss_type": "cispo",
     "epsilon_high": 1.5},
    {"mask_truncated_completions": True, "num_iterations": 2},
    {"top_entropy_quantile": 0.5, "num_iterations": 2},
    {"loss_type": "vespo", "importance_sampling_level": "sequence", "num_iterations": 2},
    {"loss_type": "vespo", "importance_sampling_level": "sequence", "num_iterations": 2,
     "beta": 0.04, "use_bias_correction_kl": False},
    {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
], ids=str)  # fmt: skip
def test_other_settings(settings, folder, tmp_path, fused_calls):
    same_runs(folder, tmp_path, max_steps=4, **settings)
    assert fused_calls


ADAPTERS = {
    "layers": LORA,
    "a copy of the head": {**LORA, "modules_to_save": ["lm_head"]},
    # Scaled less: from a gradient of norm 30, rounding errors grow at each step.
    "the embedding": {**LORA, "lora_alpha": 4, "target_modules": ["embed_tokens", "down_proj"]},
}


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_lora(adapter, beta, folder, tmp_path, fused_calls):
    """The reference is the model without its adapters."""
    settings = {**SEVERAL_UPDATES, "beta": beta, "peft_config": LoraConfig(**ADAPTERS[adapter])}
    wanted = same_runs(folder, tmp_path, **settings)
    assert len(fused_calls) == 6 * 2
    assert max(entry["clip_ratio/region_mean"] for entry in wanted) > 0.1
    assert all(entry["grad_norm"] > 0.01 for entry in wanted)
    assert not beta or max(entry["kl"] for entry in wanted) > 0.01


def test_lora_that_goes_on(compact, folder, tmp_path, fused_calls):
    """Of adapters that a model comes with, the reference is a copy."""
    trainers = []
    for trainer in (GRPOTrainer, FastGRPOTrainer):
        torch.manual_seed(0)
        given = LoraConfig(**LORA, init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), given)
        trainers.append(run(trainer, model, tmp_path, **SEVERAL_UPDATES))
    wanted = same_logs(*trainers)
    assert len(fused_calls) == 6 * 2
    assert wanted[0]["kl"] == pytest.approx(0, abs=1e-6) and wanted[2]["kl"] > 0.01


def test_an_adapter_of_the_head_is_refused_by_trl(folder, tmp_path):
    lora = LoraConfig(**{**LORA, "target_modules": ["lm_head"]})
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        grpo(FastGRPOTrainer, folder, tmp_path, peft_config=lora)


@pytest.mark.parametrize("loss_type", set(LOSS_TYPES) - {"grpo", "sapo"})
def test_an_entropy_bonus(loss_type, folder, tmp_path, fused_calls):
    same_runs(
        folder, tmp_path, **bound(loss_type), max_steps=3, entropy_coef=0.1, num_iterations=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    assert fused_calls


def test_an_adaptive_entropy_bonus(folder, tmp_path, fused_calls):
    wanted = same_runs(
        folder, tmp_path, use_adaptive_entropy=True, entropy_target=1.9, entropy_coef=0.1,
        entropy_coef_delta=0.05, entropy_coef_max=0.2, gradient_accumulation_steps=2,
    )  # fmt: skip
    assert fused_calls and len({entry["entropy_coef"] for entry in wanted}) > 2


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_evaluation(loss_type, folder, tmp_path, fused_calls):
    """Nothing is accumulated there, and the batch is not split."""
    results = []
    for trainer in (GRPOTrainer, FastGRPOTrainer):
        made = run(
            trainer, folder, tmp_path, max_steps=1, beta=0.04, loss_type=loss_type,
            gradient_accumulation_steps=2, steps_per_generation=4, per_device_eval_batch_size=4,
        )  # fmt: skip
        before = len(fused_calls)
        torch.manual_seed(0)
        metrics = made.evaluate(prompts().select(range(8)))
        results.append(
            {k: v for k, v in metrics.items() if "runtime" not in k and "per_s" not in k}
        )
    assert len(fused_calls) > before
    assert results[1] == pytest.approx(results[0], rel=1e-5, abs=1e-6)


SHAPE = {
    "vocab_size": 14, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
HEADS = {
    "bias": PhiConfig(**SHAPE),
    "softcap": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0),
    "scale": GraniteConfig(**SHAPE, logits_scaling=0.7),
}
EXPERTS = Qwen3MoeConfig(
    **SHAPE, moe_intermediate_size=16, head_dim=8, num_experts=4, num_experts_per_tok=2,
    router_aux_loss_coef=0.5,
)  # fmt: skip


def saved(config, folder, output):
    """The folder of a model of another architecture, with the same tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (bias := getattr(model.lm_head, "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)
    return output


@pytest.mark.parametrize("head", HEADS)
def test_what_else_acts_on_the_logits(head, folder, tmp_path, fused_calls):
    same_runs(saved(HEADS[head], folder, tmp_path / "model"), tmp_path, max_steps=2)
    assert fused_calls


def test_experts_keep_their_balance_loss(folder, tmp_path, fused_calls):
    model = saved(EXPERTS, folder, tmp_path / "model")
    wanted = same_runs(model, tmp_path, max_steps=3, gradient_accumulation_steps=2)
    assert fused_calls and all(entry["aux_loss"] > 0.1 for entry in wanted)


def one_call(trainer, tmp_path, given, without=(), **inputs):
    """Loss, gradients and metrics of one micro-batch, of prepared log-probs but for some."""
    setting = make_setting(torch.float32)
    left = {k: v for k, v in setting.inputs.items() if k not in without}
    setting = setting._replace(inputs=left)
    made = trl_trainer(setting, tmp_path, trainer=trainer, **given)
    loss, gradients = trl_loss(made, setting, **inputs)
    return loss.item(), gradients, {k: v[-1] for k, v in made._metrics["train"].items()}


def same_call(*args, **inputs):
    theirs = one_call(GRPOTrainer, *args, **inputs)
    ours = one_call(FastGRPOTrainer, *args, **inputs)
    # Terms of order 1 cancel in the loss.
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)
    flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (ours[1], theirs[1])]
    assert relative_error(*flat) <= 1e-4
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5, abs=1e-6, nan_ok=True)
    return theirs


@pytest.mark.parametrize("case", CASES)
def test_every_loss(case, compact, tmp_path, fused_calls):
    """A completion with a tool's tokens, an empty one, one with a NaN of the sampler."""
    loss, gradients, _ = same_call(tmp_path, CASES[case][0])
    assert len(fused_calls) == 1 and sum(g.norm() for g in gradients) > 1e-3


@pytest.mark.parametrize("mode", CORRECTIONS)
def test_a_correction_without_an_upper_bound(mode, tmp_path, fused_calls):
    sampler = make_setting(torch.float32).inputs["sampling_per_token_logps"]
    sampler[0, 0] -= 5
    given = {"loss_type": "dapo", **vllm(mode, 0.5, None)}
    same_call(tmp_path, given, sampling_per_token_logps=sampler)
    assert fused_calls and torch.tensor(80.0).exp() < NO_BOUND


def test_a_sampler_without_a_correction(tmp_path, fused_calls):
    given = {**vllm("token_mask", 0.9, 1.1), "vllm_importance_sampling_correction": False}
    same_call(tmp_path, {"loss_type": "grpo", **given})
    assert fused_calls


def test_advantages_per_token(compact, tmp_path, fused_calls):
    signs = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    same_call(tmp_path, {"loss_type": "dapo"}, advantages=signs)
    assert fused_calls


@pytest.mark.parametrize("given", [
    {"loss_type": "grpo"}, {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
], ids=str)  # fmt: skip
def test_on_policy(given, compact, tmp_path, fused_calls):
    same_call(tmp_path, given, without=("old_per_token_logps", "sampling_per_token_logps"))
    assert fused_calls


def test_as_many_tokens_as_completions(compact, tmp_path, fused_calls):
    """Advantages are one for each completion, not for each token."""
    lengths = torch.tensor([3, 1, 2, 0, 0, 0])
    mask = (torch.arange(9) < lengths[:, None]).long()
    given = {"loss_type": "grpo"}
    same_call(tmp_path, given, completion_mask=mask, tool_mask=torch.ones_like(mask))
    assert fused_calls


def test_the_off_policy_mask_asks_the_sampler_first(tmp_path, fused_calls):
    inputs = make_setting(torch.float32).inputs
    far = inputs["old_per_token_logps"].clone()
    far[1] += 5
    given = {"loss_type": "grpo", "off_policy_mask_threshold": 2.0}
    same_call(tmp_path, given, sampling_per_token_logps=far)
    assert fused_calls and inputs["advantages"][1] < 0


def test_vespo_bounds_token_log_ratios(tmp_path, fused_calls):
    """One token 25 nats from the sampler's, others making up for 20 of them."""
    old = exact_logps(*make_setting(torch.float32))[0].detach() + 20.1 / 8
    old[0, 3] -= 25 + 20.1 / 8
    same_call(tmp_path, {"loss_type": "vespo"}, old_per_token_logps=old)
    assert fused_calls


def test_a_threshold_that_the_policy_itself_exceeds(tmp_path, fused_calls):
    given = {"loss_type": "grpo", "off_policy_mask_threshold": -0.05}
    with pytest.warns(UserWarning, match="off_policy_mask_threshold=-0.05"):
        same_call(tmp_path, given, without=("old_per_token_logps", "sampling_per_token_logps"))
    assert not fused_calls


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_accumulated_steps(loss_type, tmp_path, fused_calls):
    given = {**bound(loss_type), "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    same_call(tmp_path, given, num_items_in_batch=torch.tensor(300))
    assert fused_calls


@pytest.mark.parametrize("given", [
    {"loss_type": "dapo"}, {"loss_type": "bnpo"}, {"loss_type": "bnpo", "entropy_coef": 0.1},
], ids=str)  # fmt: skip
def test_a_batch_without_a_token(given, compact, tmp_path, fused_calls):
    """A differentiable zero, as TRL's."""
    nothing = {
        "completion_mask": torch.zeros(6, 9, dtype=torch.long),
        "num_items_in_batch": torch.tensor(0),
    }
    loss, gradients, _ = one_call(FastGRPOTrainer, tmp_path, given, **nothing)
    assert fused_calls and loss == 0 and all(g.eq(0).all() for g in gradients)


def test_far_tool_tokens_leave_the_metrics_finite(tmp_path, fused_calls):
    """Their log-probs under the old policy may be anything."""
    inputs = make_setting(torch.float32).inputs
    old, tools = inputs["old_per_token_logps"], inputs["tool_mask"] == 0
    assert tools.any()
    old[tools] = inputs["ref_per_token_logps"][tools] - 85
    same_call(tmp_path, {"loss_type": "grpo", "beta": 0.3}, old_per_token_logps=old)
    assert fused_calls


NOT_FUSED = {
    "loss_type='cispo': epsilon_high": {"loss_type": "cispo"},
    "entropy_coef=0.1": {"loss_type": "grpo", "entropy_coef": 0.1},
    "entropy_coef=0.2": {"loss_type": "sapo", "entropy_coef": 0.2},
    "top_entropy_quantile=0.5": {"top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    "PROMPT_TUNING": {
        "peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    },
    "ratio_level": {"loss_type": "vespo", "importance_sampling_level": "sequence", "beta": 0.04},
}


@pytest.mark.parametrize("named", NOT_FUSED)
def test_what_has_no_equal_is_said_once_and_left_to_trl(
    named, folder, tmp_path, fused_calls, monkeypatch
):
    """On log-probs of linear_logps."""
    scored, original = [], chunked_head.linear_logps

    def spy(hidden, *args, **kwargs):
        scored.append(torch.is_grad_enabled())
        return original(hidden, *args, **kwargs)

    monkeypatch.setattr(chunked_head, "linear_logps", spy)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        same_runs(folder, tmp_path, max_steps=2, **NOT_FUSED[named])
    (message,) = {str(w.message) for w in said if "fastgrpo" in str(w.message)}
    assert sum("fastgrpo" in str(w.message) for w in said) == 1
    assert named in message and "TRL's own loss runs" in message
    assert any(scored) and not fused_calls


def claim(owner, name, value):
    """Says of a trainer what would take other machines to be true."""
    return lambda trainer: setattr(owner(trainer), name, value)


OTHER_MACHINES = {
    "FSDP 1": claim(lambda trainer: trainer, "is_fsdp_enabled", True),
    "DeepSpeed": claim(lambda trainer: trainer, "is_deepspeed_enabled", True),
    "torch_compile": claim(lambda trainer: trainer.args, "torch_compile", True),
    "several processes": claim(
        lambda trainer: trainer, "accelerator", SimpleNamespace(num_processes=2)
    ),
    "sampler's log-probs": lambda trainer: vars(trainer).update(
        use_vllm=True, vllm_importance_sampling_correction=True
    ),
    "loss_type='new'": claim(lambda trainer: trainer, "loss_type", "new"),
}


@pytest.mark.parametrize("named", OTHER_MACHINES)
def test_what_was_never_tried_is_left_to_trl(named, folder, tmp_path):
    trainer = grpo(FastGRPOTrainer, folder, tmp_path, top_entropy_quantile=0.5)
    inputs = make_setting(torch.float32).inputs
    inputs = {k: v for k, v in inputs.items() if k != "sampling_per_token_logps"}
    inputs["num_items_in_batch"] = torch.tensor(30)
    trainer.current_gradient_accumulation_steps = 1
    loss_config(trainer, inputs)
    OTHER_MACHINES[named](trainer)
    with pytest.raises(NotFused, match=named):
        loss_config(trainer, inputs)


def test_other_versions_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(RuntimeError, match="1.17.0"):
        grpo(FastGRPOTrainer, folder, tmp_path)


def test_nothing_is_left_behind(folder, tmp_path):
    """Beside it stock trainers are as they were."""
    before = utils._ChunkedLogProbFunction
    made = run(FastGRPOTrainer, folder, tmp_path, max_steps=1)
    assert utils._ChunkedLogProbFunction is before
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert inspect.signature(made.model.forward) == inspect.signature(plain.forward)


def test_16_bits(folder, tmp_path, fused_calls):
    """Old and reference log-probs are rounded as the policy's: at first there is no KL."""
    made = run(
        FastGRPOTrainer, folder, tmp_path, bf16=True, beta=0.04, num_iterations=2, max_steps=4
    )
    entries = logged(made)
    assert fused_calls and entries[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert entries[0]["clip_ratio/region_mean"] == 0 < entries[1]["clip_ratio/region_mean"]
