"""Whether a FusedLM gives the log-probs of its model's own forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastgrpo.model.head import UnsupportedHeadError, describe, layer_of, unwrapped

# A model in 16 bits rounds its own logits, by up to 0.06 each at |z| = 30.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3}
HALF_TOLERANCE = 0.25


@torch.no_grad()
def compare(fused: nn.Module) -> None:
    """Raise UnsupportedHeadError unless the log-probs of a FusedLM are those of its model's own."""
    model = unwrapped(fused.model)
    weight = describe(model, layer_of(model)).weight
    vocab, device = len(weight), weight.device
    # Fixed tokens, so that nothing random is drawn. Small ids are often special.
    ids = (torch.arange(1, 17, device=device).view(2, 8) * 7919 + 11) % vocab
    mask = torch.ones_like(ids)
    short, padded = ids[1:, :5], ids.clone()
    padded[1, 3:], padded[1, :3] = short[0], 0
    mask[1, :3] = 0
    # Autocast would round the model's own logits, and the tolerance is that of its dtype.
    with evaluation_mode(fused.model), torch.autocast(device.type, enabled=False):
        expected = [_own_logps(model, row) for row in (ids[:1], short)]
        scored = mask.bool()
        scored[:, 0] = False
        scored[1, 3] = False
        found = fused(padded, mask, scored).logps
    dtype = weight.dtype
    tolerance = TOLERANCES.get(dtype, HALF_TOLERANCE)
    head = describe(model, layer_of(model))
    for name, actual, wanted in (
        ("its hidden states and head", found[0, 1:], expected[0]),
        ("a row padded on the left", found[1, 4:], expected[1]),
    ):
        error = (actual.double() - wanted.double()).abs().max().item()
        if not error <= tolerance:
            raise UnsupportedHeadError(
                f"model: expected {name} of {type(model).__name__} to give log-probs within"
                f" {tolerance} nats of its own forward, got {error:.2g}, with"
                f" logit_scale={head.logit_scale}, softcap={head.softcap},"
                f" {'no ' if head.bias is None else ''}bias"
            )


def on_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def refuse_meta(model: nn.Module) -> None:
    """Raise ValueError for a model that has nothing to be compared yet."""
    if on_meta(model):
        raise ValueError(
            "model: expected parameters with values, got some on the meta device; materialise them"
            " first, with to_empty and load_state_dict"
        )


def _own_logps(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the log-probs (L - 1,) of a row's tokens by the model's own logits."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back into its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
