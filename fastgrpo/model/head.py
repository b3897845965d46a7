"""The head of a causal language model of transformers, as the fused functions take it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Fields of model configs that scale the logits: 1 multiplies, -1 divides. logits_scaling divides in
# every family but one.
SCALE_FIELDS = {
    "logit_scale": 1,
    "logits_scaling": -1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
    "logits_mup_width_multiplier": -1,
}
MULTIPLIES = {("hyperclovax", "logits_scaling")}
# Fields that some configs have and their models ignore.
IGNORED = {("mpt", "logit_scale")}
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class UnsupportedHeadError(ValueError):
    """A model whose log-probs the fused functions cannot reproduce."""


class ModelHead(NamedTuple):
    """The last layer: z = softcap(logit_scale * (hidden @ weight.T + bias)).

    With `lora` = (A, B) the weight counts as weight + B @ A.
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    lora: tuple[Tensor, Tensor] | None = None  # (R, H), (V, R)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `grpo_loss` and `linear_logps` beside the weight."""
        options = self._asdict()
        del options["weight"]
        return options


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model within data parallelism, `torch.compile` and PEFT."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            if any(c.is_prompt_learning for c in model.peft_config.values()):
                raise UnsupportedHeadError(
                    f"model: expected no prompt learning, got {type(model).__name__}: its virtual"
                    " tokens are not in input_ids"
                )
            model = model.get_base_model()
        elif type(model).__name__ == "PeftMixedModel":
            raise UnsupportedHeadError("model: expected a PeftModel, got PeftMixedModel")
        else:
            return model


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ValueError for a model inside what is to be around FusedLM."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    wrappers = {
        DistributedDataParallel: "DistributedDataParallel(FusedLM(model))",
        DataParallel: "DistributedDataParallel(FusedLM(model)), a process per device",
        FullyShardedDataParallel: "fully_shard(FusedLM(model))",
        FSDPModule: "fully_shard of FusedLM(model) after it is made",
    }
    for module in model.modules():
        for wrapper, order in wrappers.items():
            if isinstance(module, wrapper):
                raise ValueError(f"model: expected a bare model, got {wrapper.__name__}; {order}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model: expected a bare model, got torch.compile; compile FusedLM(model)")


def backbone_of(model: nn.Module) -> nn.Module:
    """Return what turns token ids into hidden states, of an unwrapped model."""
    backbone = getattr(model, "base_model", None)
    if backbone is model:  # a family whose base_model_prefix names another level
        backbone = getattr(model, "model", None)
    if not isinstance(backbone, nn.Module):
        raise UnsupportedHeadError(
            f"model: expected a causal language model of transformers with a base_model, got"
            f" {type(model).__name__}"
        )
    return backbone


def layer_of(model: nn.Module) -> nn.Module:
    """Return the layer that makes the logits now; PEFT may have put another in its place."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None or (layer := get()) is None:
        raise UnsupportedHeadError(
            f"model: expected a model with get_output_embeddings, got {type(model).__name__}"
        )
    embedding = model.get_input_embeddings()
    if model.config.get_text_config().tie_word_embeddings and hasattr(embedding, "base_layer"):
        raise UnsupportedHeadError(
            "embed_tokens: expected no adapter where the head is tied to the embedding, got"
            f" {_full_name(embedding)}"
        )
    if hasattr(layer, "modules_to_save"):  # PEFT's copy that is trained in the original's place
        if layer.disable_adapters or not layer.active_adapters:
            return layer.original_module
        (active,) = layer.active_adapters
        return layer.modules_to_save[active]
    _refuse_trainable_tokens(layer)
    if hasattr(layer, "base_layer"):
        _check_adapter(layer)
    return layer


def describe(model: nn.Module, layer: nn.Module) -> ModelHead:
    """Return a layer's weight, bias and adapter, with the scale and softcap of the config."""
    config = model.config.get_text_config()
    kind, scale, softcap = config.model_type, 1.0, None
    for name, power in SCALE_FIELDS.items():
        value = getattr(config, name, None)
        if value is None or isinstance(value, bool) or (kind, name) in IGNORED:
            continue
        multiplies = power == 1 or any(k in kind and name == n for k, n in MULTIPLIES)
        scale *= value if multiplies else 1 / value
    for name in SOFTCAP_FIELDS:
        softcap = getattr(config, name, None) or softcap
    layer, lora = _without_adapter(layer)
    return ModelHead(layer.weight, getattr(layer, "bias", None), float(scale), softcap, lora)


def _refuse_trainable_tokens(layer: nn.Module) -> None:
    if hasattr(layer, "token_adapter"):
        raise UnsupportedHeadError(
            "lm_head: expected no trainable_token_indices on the head, got"
            f" {_full_name(layer)}; train a copy of it with modules_to_save=['lm_head']"
        )


def _check_adapter(layer: Any) -> None:
    """Raise UnsupportedHeadError for what acts on a head and is not LoRA, plain or stabilised."""
    _refuse_trainable_tokens(layer.base_layer)
    if not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
        raise UnsupportedHeadError(
            f"lm_head: expected a plain layer or LoRA on it, got {_full_name(layer)}; train a copy"
            " of the head with modules_to_save=['lm_head'], or leave the head out of the adapter's"
            " target_modules"
        )
    names = _acting(layer)
    if names and layer.base_layer.weight.requires_grad:
        raise UnsupportedHeadError(
            "lm_head: expected a frozen weight under LoRA, got a trained one"
        )
    for name in names:
        variant, dropout = layer.lora_variant.get(name), layer.lora_dropout[name]
        if variant is not None:
            kind = getattr(variant, "__name__", type(variant).__name__)
            raise UnsupportedHeadError(f"lm_head: expected plain LoRA, got {kind} in {name!r}")
        if getattr(dropout, "p", 0.0) > 0:
            raise UnsupportedHeadError(
                f"lm_head: expected lora_dropout=0, got {dropout.p} in {name!r}: the fused head has"
                " no dropout"
            )
        if layer.lora_B[name].bias is not None:
            raise UnsupportedHeadError(f"lm_head: expected lora_bias=False, got True in {name!r}")


def _acting(layer: Any) -> list[str]:
    """Return the adapters of a layer that change what it computes, and are not merged into it."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _without_adapter(layer: Any) -> tuple[nn.Module, tuple[Tensor, Tensor] | None]:
    """Return the layer beneath an adapter, and (A, B) of what it adds: B @ A.

    None where there is no adapter, where it is switched off, and where it is merged into the layer.
    """
    if not hasattr(layer, "base_layer"):
        return layer, None
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer does itself when it is called
    names = _acting(layer)
    if not names:
        return layer.base_layer, None
    downs = [layer.lora_A[name].weight * layer.scaling[name] for name in names]
    ups = [layer.lora_B[name].weight for name in names]
    dtype = torch.promote_types(downs[0].dtype, layer.base_layer.weight.dtype)
    return layer.base_layer, (torch.cat(downs).to(dtype), torch.cat(ups, 1).to(dtype))


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
