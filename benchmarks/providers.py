"""Put every implementation that is compared behind one signature.

All compute per-token log-probs or a whole GRPO loss from the same batch. A provider that only has
log-probs gets its loss from `policy_loss`, and so does the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import LossInputs
from fastgrpo import Support
from fastgrpo.packing import rows_of_entries
from fastgrpo_kernels.runtime import INTERPRETED

EPSILON = 0.2

LogpsFn = Callable[[LossInputs], Tensor]  # -> (B, T), nats, differentiable
LossFn = Callable[[LossInputs], Tensor]  # -> (), differentiable


class Provider(NamedTuple):
    """An implementation. Without a `fused_loss` its loss is composed from `token_logps`."""

    name: str
    token_logps: LogpsFn
    fused_loss: LossFn | None = None
    sparsity: float = 0.0  # tau: gradients are an unbiased estimate; 0: exact
    takes_support: bool = False

    def loss(self, batch: LossInputs) -> Tensor:
        if self.fused_loss is not None:
            return self.fused_loss(batch)
        return policy_loss(self.token_logps(batch), batch)


def policy_loss(logps: Tensor, batch: LossInputs, normalizer: Tensor | None = None) -> Tensor:
    """Return the clipped-ratio loss averaged over tokens, in the dtype of `logps`."""
    advantages = batch.advantages[:, None]
    # Before the exponential: whatever stands at a masked position must not become inf * 0.
    log_ratio = torch.where(batch.completion_mask, logps - batch.old_logps, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    count = batch.completion_mask.sum() if normalizer is None else normalizer
    return torch.where(batch.completion_mask, loss, 0.0).sum() / count


def plain_logits() -> Provider:
    """Full logits in the model's dtype, log-softmax in fp32: what a Hugging Face model does.

    Those outside a support are masked, as trainers do that replay a sampler's ids.
    """

    def token_logps(batch: LossInputs) -> Tensor:
        logits = F.linear(batch.hidden, batch.weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if batch.support is not None:
            logits = logits.masked_fill(~_kept(batch.support, logits.shape), -torch.inf)
        return logits.log_softmax(-1).gather(-1, batch.completion_ids[..., None])[..., 0]

    return Provider("plain logits", token_logps, takes_support=True)


def _kept(support: Support, shape: torch.Size) -> Tensor:
    """Return what a support whose tokens all have ids keeps, (..., V) bool of this shape."""
    kept = torch.zeros(shape, dtype=torch.bool, device=support.ids.device)
    kept.view(-1, shape[-1])[rows_of_entries(support.cu, len(support.ids)), support.ids] = True
    return kept


def compiled_logits() -> Provider:
    if not torch.cuda.is_available():
        raise ImportError("needs CUDA")
    plain = plain_logits()
    compiled = partial(torch.compile, dynamic=False)
    return Provider("torch.compile", compiled(plain.token_logps), compiled(plain.loss))


def trl_chunked() -> Provider:
    from trl.kernels import ChunkedLogProbFunction

    vocabulary_chunk = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def rows(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, ids, 1.0, vocabulary_chunk, None, 1.0, ()
        )[0]

    # TRL drops masked rows where its Triton kernels run, and scores every row elsewhere.
    return Provider("TRL chunked", by_rows(rows, compact=torch.cuda.is_available()))


def liger_grpo() -> Provider:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        loss_type="bnpo",
    )

    def fused_loss(batch: LossInputs) -> Tensor:
        return module(
            batch.hidden,
            batch.weight,
            batch.completion_ids,
            batch.completion_mask,
            batch.advantages,
            old_per_token_logps=batch.old_logps,
        )[0]

    def token_logps(batch: LossInputs) -> Tensor:
        return LigerFusedLinearPPOBase.chunk_forward(
            batch.hidden, batch.weight, batch.completion_ids
        )

    return Provider("Liger GRPO", token_logps, fused_loss)


def liger_scaled_cross_entropy() -> Provider:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def rows(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, ids)

    return Provider("Liger scaled CE", by_rows(rows))


def torch_linear_cross_entropy() -> Provider:
    try:
        from torch.nn import LinearCrossEntropyOptions
    except ImportError as error:
        raise ImportError("needs torch >= 2.13") from error

    def rows(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        options = LinearCrossEntropyOptions()
        return -F.linear_cross_entropy(hidden, weight, ids, reduction="none", options=options)

    return Provider("F.linear_cross_entropy", by_rows(rows))


def apple_cce(exact: bool) -> Provider:
    if not torch.cuda.is_available():
        raise ImportError("needs CUDA")
    from cut_cross_entropy import linear_cross_entropy

    # The default leaves out gradients below 2**-12, the exact form does not.
    kind = "cce_exact" if exact else "cce"

    def rows(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, ids, reduction="none", impl=kind)

    return Provider("Apple CCE exact" if exact else "Apple CCE", by_rows(rows))


def verl_kernel() -> Provider:
    if not torch.cuda.is_available():
        raise ImportError("needs CUDA")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def rows(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, ids, 1.0, "none")[0]

    return Provider("verl kernel", by_rows(rows))


def quack() -> Provider:
    raise ImportError("has no per-token log-probs and no policy loss")


def fastgrpo(backend: str, sparsity: float = 0.0) -> Provider:
    import fastgrpo

    if backend == "triton" and not (torch.cuda.is_available() or INTERPRETED):
        raise ImportError("needs CUDA")
    config = fastgrpo.LossConfig.preset("dapo", epsilon_low=EPSILON, epsilon_high=EPSILON)
    sparse = {"sparsity": sparsity, "seed": 0} if sparsity else {}

    def token_logps(batch: LossInputs) -> Tensor:
        ids = batch.completion_ids.masked_fill(~batch.completion_mask, -100)
        drawn = sparse | {"old_logps": batch.old_logps} if sparse else {}
        return fastgrpo.linear_logps(
            batch.hidden, batch.weight, ids, support=batch.support, backend=backend, **drawn
        ).logps

    def fused_loss(batch: LossInputs) -> Tensor:
        return fastgrpo.grpo_loss(
            batch.hidden,
            batch.weight,
            batch.completion_ids,
            batch.completion_mask,
            batch.advantages,
            old_logps=batch.old_logps,
            config=config,
            backend=backend,
            skip_zero_advantage=batch.skip_zero_advantage,
            support=batch.support,
            **sparse,
        ).loss

    name = f"fastgrpo {'sparse' if sparsity else backend}"
    return Provider(name, token_logps, fused_loss, sparsity, takes_support=not sparsity)


def by_rows(rows: Callable[[Tensor, Tensor, Tensor], Tensor], *, compact: bool = False) -> LogpsFn:
    """Wrap a function of (N, H), (V, H), (N,); `compact` drops the masked rows first."""

    def token_logps(batch: LossInputs) -> Tensor:
        ids, mask = batch.completion_ids, batch.completion_mask
        if not compact:
            return rows(batch.hidden.flatten(0, 1), batch.weight, ids.flatten()).view(ids.shape)
        logps = rows(batch.hidden[mask], batch.weight, ids[mask])
        return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, logps.float())

    return token_logps


LOADERS: dict[str, Callable[[], Provider]] = {
    "plain logits": plain_logits,
    "torch.compile": compiled_logits,
    "TRL chunked": trl_chunked,
    "Liger GRPO": liger_grpo,
    "Liger scaled CE": liger_scaled_cross_entropy,
    "F.linear_cross_entropy": torch_linear_cross_entropy,
    "Apple CCE": lambda: apple_cce(exact=False),
    "Apple CCE exact": lambda: apple_cce(exact=True),
    "verl kernel": verl_kernel,
    "QuACK": quack,
    "fastgrpo torch": lambda: fastgrpo("torch"),
    "fastgrpo triton": lambda: fastgrpo("triton"),
    # Not "auto": on a GPU torch would pass for the kernels. The interpreter takes minutes for it.
    "fastgrpo sparse": lambda: fastgrpo(
        "triton" if torch.cuda.is_available() else "torch", sparsity=1e-3
    ),
}


def load(names: tuple[str, ...] = tuple(LOADERS)) -> tuple[list[Provider], dict[str, str]]:
    """Return the providers that work here, and for each of the others why it does not."""
    available, missing = [], {}
    for name in names:
        try:
            available.append(LOADERS[name]())
        # A broken peer (a CUDA library that does not load, say) is reported like a missing one.
        except Exception as error:  # noqa: BLE001
            if name == "fastgrpo torch":  # works everywhere, or is broken
                raise
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return available, missing
