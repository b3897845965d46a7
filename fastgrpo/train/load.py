"""Model and tokenizer of a policy: a GGUF file, a folder, a hub name, or tiny ones made here."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import fastgrpo
from fastgrpo_kernels.runtime import obstacle

from .arithmetic import character_tokenizer, tiny_model
from .config import TrainConfig
from .layouts import choose_layout
from .model import Policy, end_ids

ADAPTER = "adapter_config.json"


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of ``config.model``, or one of digits; ValueError if there is none.

    An adapter without a tokenizer beside it has that of its model.
    """
    if config.model is None:
        return character_tokenizer()
    name = config.model
    if is_adapter(name) and not (Path(name) / "tokenizer_config.json").is_file():
        name = _base_of_adapter(name)
    tokenizer = _loaded(AutoTokenizer.from_pretrained, name)
    # Of a folder without its files, transformers makes one that knows no text.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"model: expected a tokenizer in {name}, got none")
    return tokenizer


def load_policy(config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Policy:
    """Load the model that ``config`` names, or make a tiny one; check tokens and head.

    ``config.model`` is a GGUF file, whose weights are dequantised, a folder, a name on the hub, or
    the folder of a LoRA adapter, which then goes on learning. What cannot be loaded or trained is a
    ValueError. ``tokenizer`` is that of ``load_tokenizer``, which is called if it is None.
    """
    device = _device(config.device)
    if config.backend == "triton" and (reason := obstacle(torch.device(device))):
        raise ValueError(f"backend: got 'triton', but {reason}")
    tokenizer = tokenizer or load_tokenizer(config)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    dtype = dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    missing: set[str] = set()
    if config.model is None:
        model = tiny_model(tokenizer).to(dtype)
    elif is_adapter(config.model):
        _needs("peft", "lora", config.model)
        if config.lora_rank:
            raise ValueError(f"lora_rank: {config.model} is an adapter already, which goes on")
        model = _base_model(_base_of_adapter(config.model), dtype)
        missing = _loaded(model.load_adapter, config.model, is_trainable=True).missing_keys
    else:
        model = _base_model(config.model, dtype)
    if config.lora_rank:
        _add_adapter(model, config)
    _check_head(model, "lora_target_modules" if config.lora_rank else "model")
    _refuse_missing(missing, config.model)
    _check_router(model)
    # Only the token ids are kept: a repetition penalty or top-k that came with the model would make
    # the sampler's distribution differ from the one that the loss assumes.
    loaded = model.generation_config
    ends = end_ids(loaded, tokenizer)
    if not ends:
        raise ValueError(
            f"model: expected an end-of-sequence token, of the tokenizer or the generation config, "
            f"got none in {config.model}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    _check_ids(model, tokenizer, ends)
    model.generation_config = GenerationConfig(
        eos_token_id=ends,
        bos_token_id=loaded.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Dropout stays off while learning, so that the ratio to the sampler starts at 1.
    model = model.to(device).eval()
    if config.gradient_checkpointing:
        _recompute_activations(model)
    layout, why = choose_layout(model)
    print(why)
    return Policy(model, tokenizer, fastgrpo.head_of(model), layout, loaded)


def _device(name: str) -> str:
    """Return the device's name, of the best one for "auto"; ValueError where there is no such."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ValueError(f"device: got {name!r}: {str(error).splitlines()[0]}") from error
    return name


def is_adapter(model: str) -> bool:
    """Return whether ``model`` is the folder of a LoRA adapter."""
    return (Path(model) / ADAPTER).is_file()


def _base_of_adapter(folder: str) -> str:
    path = Path(folder, ADAPTER)
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:  # no JSON, no object
        raise ValueError(
            f"model: expected the name of its model in {path}, got {error!r}"
        ) from error
    if not base:
        raise ValueError(f"model: expected the name of its model in {path}, got none")
    return base


def _base_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    model, info = _loaded(
        AutoModelForCausalLM.from_pretrained, name, dtype=dtype, output_loading_info=True
    )
    _refuse_missing(info["missing_keys"], name)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"model: expected a model or the folder of an adapter, got that of {name}")
    if name.endswith(".gguf"):
        # The weights are no longer quantised, and a checkpoint must not say that they are.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.name_or_path = model.config._name_or_path = name
    return model


def _refuse_missing(weights: set[str], name: str | None) -> None:
    """Raise for weights that transformers did not find, and has drawn at random."""
    if weights:
        raise ValueError(
            f"model: expected all weights in {name}, but transformers {transformers.__version__} "
            f"did not find {', '.join(sorted(weights))}"
        )


def _loaded(load: Callable[..., Any], name: str, **options: Any) -> Any:
    """Return what transformers loads from a name; its errors become one line."""
    path = Path(name)
    if path.suffix == ".gguf":
        _needs("gguf", "gguf", name)
        _needs("accelerate", "gguf", name)
        if not path.is_file():
            raise ValueError(f"model: expected a file at {name}, got none")
        name, options = str(path.parent), options | {"gguf_file": path.name}
    try:
        if path.is_dir() and not any((path / f).is_file() for f in ("config.json", ADAPTER)):
            raise OSError("no config.json in this folder")
        return load(name, **options)
    except Exception as error:  # a file that is cut, sizes at odds, a type that nobody knows
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ValueError(
            f"model: expected a GGUF file, a folder or a name on the hub that transformers loads, "
            f"got {str(path)!r}: {first}"
        ) from error


def _needs(package: str, extra: str, name: str) -> None:
    if find_spec(package) is None:
        raise ValueError(
            f"model: {name} needs the package {package}, which is not installed: "
            f"pip install 'fastgrpo[{extra}]'"
        )


def _add_adapter(model: PreTrainedModel, config: TrainConfig) -> None:
    """Freeze the model and put a LoRA adapter into it; the head is left alone."""
    _needs("peft", "lora", "--lora-rank")
    from peft import LoraConfig

    try:
        model.add_adapter(
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                lora_dropout=0.0,
                target_modules=config.lora_target_modules or "all-linear",
                task_type="CAUSAL_LM",
            )
        )
    except ValueError as error:
        head = model.get_output_embeddings()
        known = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        raise ValueError(
            f"lora_target_modules: expected names among {sorted(known)}, got "
            f"{config.lora_target_modules}: {error}"
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _check_head(model: PreTrainedModel, field: str) -> None:
    """Raise where an adapter acts on the head, whose weight a policy keeps from here on.

    A copy that is trained in its place (peft's ``modules_to_save``) is such a weight.
    """
    layers = [model.get_output_embeddings()]
    if model.config.get_text_config().tie_word_embeddings:
        layers.append(model.get_input_embeddings())
    for layer in layers:
        if hasattr(layer, "base_layer") or hasattr(layer, "token_adapter"):
            (name,) = (name for name, module in model.named_modules() if module is layer)
            raise ValueError(
                f"{field}: expected an adapter that leaves the head, and what it is tied to, "
                f"alone, got one on {name}"
            )


def _check_router(model: PreTrainedModel) -> None:
    """Raise where a mixture of experts asks for a loss that balances them: none is added here."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            f"model: expected output_router_logits false in the config of {type(model).__name__}, "
            "got true, which asks for an auxiliary loss that this loop does not add; "
            "fastgrpo.FusedLM does"
        )


def _check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
    """Raise unless the model has a row for every token that is put beside a text."""
    rows = model.get_input_embeddings().weight.shape[0]
    written = tokenizer("")["input_ids"]  # what the tokenizer adds to every prompt
    for role, ids in (("pad", [tokenizer.pad_token_id]), ("end", ends), ("special", written)):
        if beyond := [i for i in ids if i >= rows]:
            raise ValueError(
                f"model: expected the {role} token of its tokenizer below {rows}, the rows of its "
                f"embedding, got {tokenizer.convert_ids_to_tokens(beyond)} with ids {beyond}; "
                f"resize the embedding, or choose a token that it has"
            )


def _recompute_activations(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on. Layers heed it in training mode only, so they lose dropout.

    Everything else stays in evaluation mode. ``model.config`` keeps its values: they are saved.
    """
    model.gradient_checkpointing_enable()
    for module in model.modules():
        module.training = module is not model and getattr(module, "gradient_checkpointing", False)
        if module.training:
            _silence(module)
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config = copy.copy(module.config)
                _silence(module.config)


def _silence(owner: nn.Module | PreTrainedConfig) -> None:
    """Set the rates of what is random in training to 0: dropout, dropped layers, jitter."""
    for name, value in list(vars(owner).items()):
        if re.search("drop|jitter", name) and type(value) in (int, float):
            setattr(owner, name, 0.0)
