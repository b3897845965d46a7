"""A tiny policy, a batch, and both losses of them: TRL's own and `grpo_loss`."""

from __future__ import annotations

from types import MethodType
from typing import NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

import fastgrpo
from fastgrpo import reference
from fastgrpo.testing import relative_error

PROMPT, LENGTH, L_MAX, VOCAB = 4, 9, 16, 61
BARS = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-9, 1e-9)}  # of the loss, of the gradients


class Setting(NamedTuple):
    """A policy and the inputs of `_compute_loss`, float64 where TRL is to compute in float64."""

    model: GPT2LMHeadModel
    inputs: dict[str, Tensor]

    @property
    def mask(self) -> Tensor:
        return self.inputs["completion_mask"] * self.inputs["tool_mask"]


def make_setting(dtype, empty=True) -> Setting:
    torch.manual_seed(0)
    # GPT-2, as younger architectures compute their norms in float32, whatever they are given.
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
        )
    ).to(dtype)  # fmt: skip
    torch.manual_seed(0)
    positions = torch.arange(LENGTH)
    lengths = torch.tensor([9, 5, 7, 3, 8, 0 if empty else 2])
    batch = len(lengths)
    inputs = {
        "prompt_ids": torch.randint(2, VOCAB, (batch, PROMPT)),
        "prompt_mask": (torch.arange(PROMPT) >= torch.tensor([0, 1, 0, 2, 3, 0])[:, None]).long(),
        "completion_ids": torch.randint(2, VOCAB, (batch, LENGTH)),
        "completion_mask": (positions < lengths[:, None]).long(),
        "tool_mask": torch.ones(batch, LENGTH, dtype=torch.long),
        "advantages": torch.tensor([0.9, -1.1, 1.4, -0.3, -0.7, 0.5]),
    }
    inputs["tool_mask"][4, 3:5] = 0
    # Sequences that are clipped as such, and sequences that are rejected.
    drift = torch.tensor([-0.6, -0.5, 0.4, 0.9, -1.0, 0.0])[:, None]
    with torch.no_grad():
        logps = exact_logps(model, inputs)[0].float()
    for name, base, distance in (
        ("old_per_token_logps", logps, 0.3),
        ("ref_per_token_logps", logps, 0.5),
        ("sampling_per_token_logps", None, 0.1),
    ):
        base = inputs["old_per_token_logps"] if base is None else base
        inputs[name] = (base + distance * (torch.randn(base.shape) + drift)).clamp(max=-1e-3)
    inputs["sampling_per_token_logps"][1, 2] = torch.nan
    return Setting(
        model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    )


def hidden_states(model, inputs) -> Tensor:
    """(B, LENGTH, H): the states that predict the completions."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return model.base_model(ids, attention_mask=mask).last_hidden_state[:, PROMPT - 1 : -1]


def exact_logps(model, inputs, temperature=1.0) -> tuple[Tensor, Tensor]:
    return reference.token_logps(
        hidden_states(model, inputs), model.lm_head.weight, inputs["completion_ids"],
        temperature=temperature,
    )[:2]  # fmt: skip


def trl_trainer(setting, tmp_path, *, use_vllm=False, beta=0.0, trainer=GRPOTrainer, **overrides):
    """A trainer of the setting's model.

    `use_vllm` would start an engine and `beta` load a reference model: both are set afterwards.
    """
    config = GMPOConfig if trainer is GMPOTrainer else GRPOConfig
    args = config(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", num_generations=2,
        per_device_train_batch_size=2, max_completion_length=L_MAX, **overrides,
    )  # fmt: skip
    vocabulary = {"<pad>": 0, "<eos>": 1}
    made = trainer(
        model=setting.model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "x"}]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(vocabulary, "<pad>")),
            pad_token="<pad>", eos_token="<eos>",
        ),
    )  # fmt: skip
    made.use_vllm, made.beta = use_vllm, beta
    made.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    made.model.train()
    if setting.model.dtype == torch.float64:

        def logps_and_entropies(self, model, *args, **kwargs):
            return *exact_logps(model, setting.inputs, self.temperature), None

        made._get_per_token_logps_and_entropies = MethodType(logps_and_entropies, made)
    return made


def sampling_ratio(trainer, inputs, mask) -> Tensor:
    """TRL's `importance_sampling_ratio`, which it computes amid its generation.

    (B, T) in its token modes, (B, 1) in its sequence modes.
    """
    gap = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]).nan_to_num(nan=0.0)
    gap = gap * mask
    mode = trainer.vllm_importance_sampling_mode
    level, action = mode.split("_")
    ratio = (gap.sum(1, keepdim=True) if level == "sequence" else gap).exp()
    low = trainer.vllm_importance_sampling_clip_min or 0.0
    high = trainer.vllm_importance_sampling_clip_max or float("inf")
    if action == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def trl_loss(trainer, setting, **inputs):
    """TRL's loss, and the gradients of all parameters."""
    inputs = {**setting.inputs, "num_items_in_batch": setting.mask.sum(), **inputs}
    if trainer.use_vllm:
        inputs["importance_sampling_ratio"] = sampling_ratio(trainer, inputs, setting.mask)
    # TRL makes tensors of its settings, in the default dtype.
    torch.set_default_dtype(setting.model.dtype)
    try:
        loss = type(trainer)._compute_loss(trainer, trainer.model, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    return loss, torch.autograd.grad(loss, list(setting.model.parameters()))


def our_loss(setting, config, temperature=1.0, **options):
    """The result of `grpo_loss`, and the gradients of all parameters."""
    model, inputs = setting
    if config.needs_sampler:
        options["sampler_logps"] = inputs["sampling_per_token_logps"]
    if config.off_policy_mask_threshold is not None:
        options["sampler_logps"] = inputs["sampling_per_token_logps"]
    out = fastgrpo.grpo_loss(
        hidden_states(model, inputs),
        model.lm_head.weight,
        inputs["completion_ids"],
        setting.mask.bool(),
        inputs["advantages"],
        old_logps=inputs["old_per_token_logps"],
        ref_logps=inputs["ref_per_token_logps"],
        config=config,
        temperature=temperature,
        **options,
    )
    return out, torch.autograd.grad(out.loss, list(model.parameters()))


def errors(theirs, ours) -> tuple[float, float]:
    """Of the gradient of all parameters, relative to theirs; of the loss, whose terms are of order
    1 and cancel: relative to 1 where it is less.
    """
    (loss, wanted), (out, actual) = theirs, ours
    flat = [torch.cat([g.flatten() for g in gradients]) for gradients in (actual, wanted)]
    assert flat[1].norm() > 1e-3, "nothing to compare"
    return abs(out.loss.item() - loss.item()) / max(abs(loss.item()), 1.0), relative_error(*flat)


def assert_same(theirs, ours, dtype):
    loss, gradient = errors(theirs, ours)
    loss_bar, gradient_bar = BARS[dtype]
    assert loss <= loss_bar and gradient <= gradient_bar, (loss, gradient)
