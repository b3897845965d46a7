"""What tests and benchmarks share: inputs with realistic logits, error measures, observers."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Batch(NamedTuple):
    """A padded batch as `grpo_loss` takes it."""

    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    completion_ids: Tensor  # (B, T)
    completion_mask: Tensor  # (B, T) bool
    advantages: Tensor  # (B,)
    old_logps: Tensor  # (B, T)
    ref_logps: Tensor  # (B, T)
    sampler_logps: Tensor  # (B, T), NaN where the sampler has none


def make_batch(
    sequences: int = 4,
    length: int = 7,
    hidden_size: int = 24,
    vocab: int = 53,
    dtype: torch.dtype = torch.float32,
    logit_std: float = 3.0,
    off_policy: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
) -> Batch:
    """Return a batch whose tokens are sampled from the policy, as in a rollout.

    `off_policy` is the rms of logps - old_logps and of logps - ref_logps in nats. That of
    old_logps - sampler_logps is a tenth of it. One sequence is full, one is empty (if there are
    more than two), the others are ragged.
    """
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sequences, length, hidden_size, generator=g).to(dtype)
    weight = (torch.randn(vocab, hidden_size, generator=g) * logit_std / hidden_size**0.5).to(dtype)
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    ids = torch.multinomial(logp.exp().flatten(0, 1), 1, generator=g).view(sequences, length)
    logps = logp.gather(-1, ids[..., None])[..., 0]
    lengths = torch.randint(1, length + 1, (sequences,), generator=g)
    lengths[0] = length
    if sequences > 2:
        lengths[-1] = 0

    def nearby() -> Tensor:
        return (logps + off_policy * torch.randn(logps.shape, generator=g).double()).float()

    mask = torch.arange(length) < lengths[:, None]
    advantages, old_logps, ref_logps = torch.randn(sequences, generator=g), nearby(), nearby()
    gap = 0.1 * off_policy * torch.randn(logps.shape, generator=g)
    unscored = torch.rand(gap.shape, generator=g) < 0.1
    sampler_logps = (old_logps + gap).masked_fill(unscored, torch.nan)
    batch = Batch(hidden, weight, ids, mask, advantages, old_logps, ref_logps, sampler_logps)
    return Batch(*(x.to(device) for x in batch))


def rms(actual: Tensor, exact: Tensor) -> float:
    """Return the root mean square error."""
    return (actual.double() - exact.double()).square().mean().sqrt().item()


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return |actual - exact| / |exact| in the L2 norm; the norm of actual where exact is 0."""
    error = (actual.double() - exact.double()).norm().item()
    return error / (exact.double().norm().item() or 1.0)


class LargestTensor(TorchDispatchMode):
    """Within this context, remember the largest storage, in bytes, that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.data_ptr() for x in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        made = [x.nbytes() for x in _storages(out) if x.data_ptr() not in given]
        self.bytes = max(self.bytes, *made, 0)
        return out


class LiveBytes(TorchDispatchMode):
    """Within this context, count the bytes of the storages that operations made and that live."""

    def __init__(self, *given: object) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {x._cdata for x in _storages(given)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in self._known and storage.nbytes():
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _forget(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.live -= size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [x.untyped_storage() for x in leaves if isinstance(x, Tensor)]
