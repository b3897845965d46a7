"""Keys and values of a batch of completions: each prompt is read once, however many follow it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .completions import left_padded

ROOM = 64  # tokens for which space is made at a time
PADDING = 0.1  # largest share of padding in a batch of prompts


class RoomyLayer(DynamicLayer):
    """Keys and values (S, heads, length, dim) with room behind them: a token is written in place.

    A DynamicLayer copies everything for each token that it takes in. A sliding window needs no
    layer of its own: the mask hides what lies before it. No more than `most` tokens come.
    """

    def __init__(self, like: DynamicLayer, completions: int, length: int, most: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = like.keys.dtype, like.keys.device, True
        self._length, self._most = length, most
        self._rooms = [
            x.new_empty(completions, x.shape[1], min(length + ROOM, most), x.shape[3])
            for x in (like.keys, like.values)
        ]
        self._show()

    def fill(self, rows: Tensor, read: DynamicLayer) -> None:
        """Write what was read of prompts for the completions at `rows` (prompts, G) int64."""
        for room, states in zip(self._rooms, (read.keys, read.values), strict=True):
            start = self._length - states.shape[-2]
            room[rows, :, :start] = 0
            room[rows, :, start : self._length] = states[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append states (S, heads, n, dim); return all of them."""
        start, self._length = self._length, self._length + key_states.shape[-2]
        if self._length > (size := self._rooms[0].shape[-2]):
            more = (0, 0, 0, min(self._length + ROOM, self._most) - size)
            self._rooms = [torch.nn.functional.pad(room, more) for room in self._rooms]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., start : self._length, :] = states
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the completions at `indices` (K,) int64."""
        self._rooms = [room[indices] for room in self._rooms]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (room[..., : self._length, :] for room in self._rooms)


def can_prefill(model: PreTrainedModel) -> bool:
    """Return whether every layer of the model keeps keys and values of its own, and no state."""
    layers = DynamicCache(config=model.config).layers
    kinds = {type(layer) for layer in layers}
    return bool(layers) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def prefill(
    model: PreTrainedModel, prompts: Sequence[Tensor], repeats: int, padding: int, most: int
) -> tuple[Tensor, Cache]:
    """Read every prompt once; return what follows them, for `repeats` completions of each.

    Args:
        prompts: P of (length,) int64.
        padding: the token id beside shorter prompts.
        most: the tokens that a completion has at most.

    Returns the logits (P * repeats, V) of the first token in the model's dtype, and the cache, in
    which all prompts end at the same place.
    """
    longest, count = max(map(len, prompts)), len(prompts) * repeats
    logits, layers = [], []
    every = torch.arange(count, device=prompts[0].device).view(-1, repeats)
    batches = list(of_like_length([len(prompt) for prompt in prompts]))
    for chosen in batches:
        ids, mask = left_padded([prompts[i] for i in chosen], padding)
        read = DynamicCache()
        out = model(
            input_ids=ids,
            attention_mask=None if mask.all() else mask.long(),
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=read,
            use_cache=True,
            logits_to_keep=1,
        )
        logits.append(out.logits[:, -1])
        layers = layers or [
            RoomyLayer(layer, count, longest, longest + most) for layer in read.layers
        ]
        for layer, prompt_layer in zip(layers, read.layers, strict=True):
            layer.fill(every[chosen], prompt_layer)
    order = torch.tensor([i for batch in batches for i in batch], device=every.device)
    return torch.cat(logits)[order.argsort().repeat_interleave(repeats)], Cache(layers=layers)


def of_like_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield batches of indices, longest first; at most PADDING of a batch would be padding."""
    batch, tokens = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and tokens + lengths[i] < (1 - PADDING) * lengths[batch[0]] * (len(batch) + 1):
            yield batch
            batch, tokens = [], 0
        batch, tokens = [*batch, i], tokens + lengths[i]
    yield batch
