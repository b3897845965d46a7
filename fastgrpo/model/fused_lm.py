"""A module around a causal language model: token ids to log-probs, or to the loss."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastgrpo import checks
from fastgrpo.logps import TokenLogps, linear_logps
from fastgrpo.loss import GRPOLoss, grpo_loss
from fastgrpo.model import layout
from fastgrpo.model.head import (
    ModelHead,
    UnsupportedHeadError,
    backbone_of,
    describe,
    layer_of,
    refuse_wrapped,
    unwrapped,
)
from fastgrpo.model.layout import Layout, Packed, Rows
from fastgrpo.model.own_forward import compare, on_meta, refuse_meta
from fastgrpo.objective.config import LossConfig
from fastgrpo.support import Support, check_support

PER_TOKEN = ("old_logps", "ref_logps", "sampler_logps")
HALF = (torch.bfloat16, torch.float16)
Result = TypeVar("Result")


class FusedLM(nn.Module):
    """Log-probs and losses of a causal language model, without its logits.

    Wrap this module, not the model in it: DistributedDataParallel(FusedLM(model)),
    fully_shard(FusedLM(model)), torch.compile(FusedLM(model)). What the model has, such as
    `generate`, `config` and `save_pretrained`, this module has too.

    Args:
        model: a causal language model of transformers, with adapters of PEFT or without.
        check: compare log-probs with the model's own forward on a few tokens, one row of them
            padded on the left. A model on the meta device is compared at its first call.

    Raises:
        UnsupportedHeadError: for a model whose log-probs come out different, and for heads that
            cannot be expressed, such as one with DoRA or dropout on the head, or prompt learning.
        ValueError: for a model that is wrapped already.
    """

    def __init__(self, model: nn.Module, *, check: bool = True) -> None:
        super().__init__()
        refuse_wrapped(model)
        if isinstance(model, FusedLM):
            raise ValueError("model: expected a bare model, got a FusedLM")
        backbone_of(unwrapped(model))
        layer_of(unwrapped(model))
        self.model = model
        self._to_be_checked = check
        if check and not on_meta(model):
            self._check()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        loss_mask: Tensor,
        advantages: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        source: Tensor | None = None,
        old_logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        sampler_logps: Tensor | None = None,
        support: Support | None = None,
        config: str | LossConfig = "grpo",
        entropy: str = "none",
        aux_scale: float = 1.0,
        **options: Any,
    ) -> GRPOLoss | TokenLogps:
        """Return the loss, or without advantages the log-probs.

        Every tensor per token has the shape of input_ids, and entry t speaks of token t.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L), 0 at padding, on either side; None: no padding. For packed rows
                None, with position_ids that begin at 0 for each sequence.
            loss_mask: (B, L) bool: the tokens that are trained on. Holes are allowed; never the
                first token of a row, and never padding.
            advantages: (S,) one for each sequence, or (B, L).
            position_ids: (B, L) int64; default: counted along attention_mask.
            sequence_ids: (B, L) int64 in [0, S): the completion that a token belongs to; default:
                its row.
            source: (B, L) int64: the position whose state predicts the token; default: the one
                before.
            old_logps, ref_logps, sampler_logps: (B, L) fp32, nats.
            support: the ids that each token was drawn from, of layout (B, L), as in `linear_logps`.
            aux_scale: of the router's auxiliary loss of a mixture of experts. Where the model's
                config sets output_router_logits, the loss has aux_scale times the config's
                router_aux_loss_coef times it, and metrics "aux_loss".
            config, entropy, options: as in `grpo_loss` and `linear_logps`. A `temperature` may be
                (B, L).

        Returns:
            `GRPOLoss` or `TokenLogps`, per token (B, L): 0 where loss_mask is False.

        Raises:
            ValueError: for any argument of a wrong shape, dtype, device or value.
        """
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "FusedLM: expected one process per device, got nn.DataParallel; use"
                " DistributedDataParallel(FusedLM(model))"
            )
        if "adapter_names" in options:
            raise ValueError("adapter_names: expected none, the same adapters for all rows")
        if self._to_be_checked:
            if torch.compiler.is_compiling():
                raise ValueError(
                    "model: expected one call before torch.compile, in which a model that was on"
                    " the meta device is compared with its own forward"
                )
            self._check()
        per_token = dict(old_logps=old_logps, ref_logps=ref_logps, sampler_logps=sampler_logps)
        self._refuse_rounding(advantages=advantages, **per_token)
        layout.check(
            input_ids, attention_mask, loss_mask,
            position_ids=position_ids, sequence_ids=sequence_ids, source=source,
        )  # fmt: skip
        layout.refuse_unseparated(attention_mask, position_ids, sequence_ids, source)
        if advantages is not None:
            checks.tensor("advantages", advantages, like=input_ids, dtypes=checks.FLOATS)
        per_row = advantages is not None and advantages.shape != input_ids.shape
        sequences = len(advantages) if per_row else None
        layout.check_sequences(sequences, sequence_ids, len(input_ids))
        if support is not None:
            check_support(support, tuple(input_ids.shape), input_ids, options.get("sparsity", 0.0))
        if source is None and sequence_ids is None:
            where: Layout = Rows.of(loss_mask)
        else:
            where = Packed.of(loss_mask, source, sequence_ids, sequences)
        if advantages is None and config != "grpo":
            raise ValueError(f"config: expected with advantages only, got {config!r}")
        hidden, aux_loss = self._hidden(input_ids, attention_mask, position_ids)
        if aux_scale != 1 and (aux_loss is None or advantages is None):
            raise ValueError(
                "aux_scale: expected 1 without advantages, and for a model whose config does not"
                f" set output_router_logits; got {aux_scale!r}"
            )
        states = where.states(hidden)
        ids = where.tokens(input_ids)
        if isinstance(temperature := options.get("temperature"), Tensor) and temperature.dim():
            options["temperature"] = where.tokens(temperature)
        if support is not None:
            options["support"] = where.kept(support)
        packed = {k: None if x is None else where.tokens(x) for k, x in per_token.items()}
        if advantages is None:
            return self._logps(where, states, ids, entropy, packed, options)
        if entropy != "none":
            raise ValueError(
                "entropy: expected config.entropy to ask for it where there are advantages"
            )
        gains = advantages if per_row else where.tokens(advantages)
        if not per_row and where.cu_seqlens is not None and len(ids) == len(where.cu_seqlens) - 1:
            checks.one_row_each(where.cu_seqlens, anywhere=True)

        def loss(hidden: Tensor, head: ModelHead) -> GRPOLoss:
            return grpo_loss(
                hidden, head.weight, ids, where.mask, gains,
                cu_seqlens=where.cu_seqlens, config=config, **packed, **head.options(), **options,
            )  # fmt: skip

        out = self._with_head(states, loss)
        spread = None if out.entropy is None else where.spread(out.entropy)
        out = out._replace(logps=where.spread(out.logps), entropy=spread)
        if aux_loss is None:
            return out
        coefficient = (
            aux_scale * unwrapped(self.model).config.get_text_config().router_aux_loss_coef
        )
        aux = {"aux_loss": aux_loss.detach(), "aux_loss_count": torch.ones_like(aux_loss)}
        return out._replace(loss=out.loss + coefficient * aux_loss, metrics=out.metrics | aux)

    def _logps(
        self,
        where: Layout,
        states: Tensor,
        ids: Tensor,
        entropy: str,
        packed: dict[str, Tensor | None],
        options: dict[str, Any],
    ) -> TokenLogps:
        old_logps = packed.pop("old_logps")
        given = [name for name, x in packed.items() if x is not None]
        if given:
            raise ValueError(f"{given[0]}: expected with advantages only")

        def logps(hidden: Tensor, head: ModelHead) -> TokenLogps:
            return linear_logps(
                hidden, head.weight, ids.masked_fill(~where.mask, -100),
                entropy=entropy, old_logps=old_logps, **head.options(), **options,
            )  # fmt: skip

        out = self._with_head(states, logps)
        return TokenLogps(*(None if x is None else where.spread(x) for x in out))

    def _hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the last hidden states (B, L, H), and a router's auxiliary loss ()."""
        model = unwrapped(self.model)
        backbone = backbone_of(model)
        takes = inspect.signature(backbone.forward).parameters
        has_positions = "position_ids" in takes or "kwargs" in takes
        if position_ids is not None and not has_positions:
            raise ValueError(
                f"position_ids: expected None for {type(model).__name__}, which takes none"
            )
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        given = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        if attention_mask is not None:
            given["attention_mask"] = attention_mask.long()
        if not has_positions:
            del given["position_ids"]
        if not getattr(model.config.get_text_config(), "output_router_logits", False):
            return backbone(**given, use_cache=False).last_hidden_state, None
        out = backbone(**given, use_cache=False, output_router_logits=True)
        balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        if balance is None:
            raise UnsupportedHeadError(
                f"output_router_logits: expected False for {type(model).__name__}, whose auxiliary"
                " loss is not known"
            )
        aux_loss = balance(
            out.router_logits, model.num_experts, model.num_experts_per_tok, given["attention_mask"]
        )
        return out.last_hidden_state, aux_loss

    def _with_head(self, hidden: Tensor, work: Callable[[Tensor, ModelHead], Result]) -> Result:
        """Return `work` of the head, inside a call of its layer where that has hooks.

        A layer that FSDP shards by itself has its weight only during such a call.
        """
        model = unwrapped(self.model)
        layer = layer_of(model)

        def forward(hidden: Tensor) -> Result:
            return work(hidden, describe(model, layer))

        if not (layer._forward_pre_hooks or layer._forward_hooks):
            return forward(hidden)
        with _forward_of(layer, forward):
            return layer(hidden)

    def _refuse_rounding(self, **tensors: Tensor | None) -> None:
        """Raise ValueError for what was rounded on the way, or will be on the way back."""
        for name, x in tensors.items():
            if isinstance(x, Tensor) and x.dtype in HALF:
                raise ValueError(
                    f"{name}: expected float32, got {x.dtype}; under FSDP2 it is rounded on the way"
                    " in: give MixedPrecisionPolicy(cast_forward_inputs=False)"
                )
        state = getattr(self, "_get_fsdp_state", None)
        policy = None if state is None else state()._mp_policy
        if policy is not None and policy.output_dtype in HALF:
            raise ValueError(
                f"output_dtype: expected None or float32 in FusedLM's MixedPrecisionPolicy, got"
                f" {policy.output_dtype}: the loss and its log-probs would be rounded"
            )

    def _check(self) -> None:
        """Compare log-probs with the model's own forward, until they have been found equal."""
        refuse_meta(self.model)
        self._to_be_checked = False  # in the call that is compared
        try:
            compare(self)
        except BaseException:
            self._to_be_checked = True
            raise


def head_of(model: nn.Module) -> ModelHead:
    """Return the head of a causal language model, for `grpo_loss` and `linear_logps`.

    It is compared with the model's own forward first, as in `FusedLM`. `model` may be wrapped by
    PEFT, DistributedDataParallel, `torch.compile` or `FusedLM`. Raises UnsupportedHeadError for a
    head that cannot be expressed, and for LoRA on the head, whose factors `FusedLM` reads anew at
    each call. Raises ValueError for a head that FSDP2 has sharded, where `FusedLM` is the way too,
    and for a model on the meta device.
    """
    inner = unwrapped(model.model if isinstance(model, FusedLM) else model)
    head = describe(inner, layer_of(inner))
    if type(head.weight).__name__ == "DTensor":
        raise ValueError(
            "model: expected a head that is not sharded, got a DTensor; use"
            " fully_shard(FusedLM(model)), in which the head is gathered for the loss"
        )
    if head.lora is not None:
        raise UnsupportedHeadError(
            "lm_head: expected no LoRA on it, got one, whose factors change with every step; use"
            " FusedLM(model), or give them to the functions yourself as lora=(A, B)"
        )
    refuse_meta(inner)
    FusedLM(inner)
    return head


@contextlib.contextmanager
def _forward_of(layer: nn.Module, forward: Callable) -> Iterator[None]:
    """Let a layer compute something else for the time being, in one thread at a time."""
    with _one_thread_in(layer):
        own = layer.__dict__.get("forward")
        layer.forward = forward
        try:
            yield
        finally:
            del layer.forward
            if own is not None:
                layer.forward = own


_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def _one_thread_in(layer: nn.Module) -> contextlib.AbstractContextManager:
    """Return the lock of a layer. It is reentrant: a checkpoint computes a forward anew in it."""
    if torch.compiler.is_compiling():  # what is traced cannot hold a lock
        return contextlib.nullcontext()
    with _locks_lock:
        return _locks.setdefault(layer, threading.RLock())
