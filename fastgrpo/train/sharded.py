"""A policy in parts: each process keeps a part of every weight (FSDP2), and gathers it for use.

Gradients, AdamW's averages and the reference are in parts too. Two ways of gathering stand beside
each other. Where gradients are made, one block after the other has its weights, and every process
runs as many forwards as all others. Where none are, as in sampling, all weights are gathered at
once, and each process runs what it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fastgrpo.model.head import describe, layer_of

from . import ranks
from .completions import Rollout
from .model import Policy

Result = TypeVar("Result")


class Root(nn.Module):
    """Runs any work while embedding, last norm and head are whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Result]) -> Result:
        """Return what ``work`` does; it may call the model's blocks."""
        return work()


@dataclass(frozen=True)
class ShardedPolicy(Policy):
    """A policy whose weights lie in all processes, fp32 in each, as DTensors.

    Its ``head`` has the shape and device of a head, and no values; ``apply`` uses the one of the
    gathered model.
    """

    root: FSDPModule = field(kw_only=True)
    saved: tuple[str, ...] = field(kw_only=True)  # names of the model's state_dict

    @property
    def mesh(self) -> DeviceMesh:
        """The processes among which the weights are parted."""
        return self.head.weight.device_mesh

    def apply(
        self, function: Callable[..., Result], rollout: Rollout, *arguments: Any, **options: Any
    ) -> Result:
        """As ``Policy.apply``. Every process calls it as often as all others, or in `gathered`.

        A rollout without completions stands for a pass that the others need: a token is forwarded,
        and every weight gets a gradient of 0.
        """

        def work() -> Result:
            hidden = self.completion_hidden(rollout if len(rollout) else self._one_token())
            head = describe(self.model, layer_of(self.model))
            states = hidden[: len(rollout.token_ids)]
            return function(states, head.weight, *arguments, **options, **head.options())

        return self.root(work)

    def in_step(self, micro_batches: list[Tensor]) -> list[Tensor]:
        """As ``Policy.in_step``: empty ones follow, until all processes have as many."""
        missing = max(ranks.gathered(len(micro_batches))) - len(micro_batches)
        nothing = torch.empty(0, dtype=torch.int64, device=self.head.weight.device)
        return micro_batches + [nothing] * missing

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """As ``Policy.gathered``: every process holds the whole model once, in its own dtype."""
        units = [module for module in self.root.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()
                # The backward begins with the root: it stays whole after its forward.
                unit.set_reshard_after_forward(unit is not self.root, recurse=False)

    def weights(self) -> dict[str, Tensor]:
        """As ``Policy.weights``, without the model's state_dict(), which would part them."""
        model = self.model
        named = dict(model.named_parameters(remove_duplicate=False))
        named |= dict(model.named_buffers(remove_duplicate=False))
        return {name: named[name].detach() for name in self.saved}

    def _one_token(self) -> Rollout:
        ids = torch.tensor(self.end_ids[:1], device=self.head.weight.device)
        return Rollout((ids,), torch.zeros_like(ids), ids, torch.ones_like(ids), ids == ids)


def shard(policy: Policy) -> ShardedPolicy:
    """Part the weights of a policy that every process has as a whole; rank 0's count.

    Those that are trained become fp32, which AdamW updates; they are gathered in the dtype that
    they had, and gradients are averaged in fp32. The unit of gathering is a block of the model, and
    one of all that is in none. ValueError for a model without blocks that transformers names, and
    for trained weights of several dtypes.
    """
    model = policy.model
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(dtypes) != 1:
        raise ValueError(
            f"fsdp: expected trained weights of one dtype, got {sorted(map(str, dtypes))}"
        )
    blocks = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    if not blocks:
        raise ValueError(
            f"fsdp: expected a model whose blocks transformers names, got {type(model).__name__}"
        )
    ranks.copy_first(model.parameters())
    (dtype,) = dtypes
    mixed = MixedPrecisionPolicy(
        None if dtype == torch.float32 else dtype, torch.float32, cast_forward_inputs=False
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    how = {"mesh": init_device_mesh(model.device.type, (ranks.count(),)), "mp_policy": mixed}
    for block in reversed(blocks):  # one within another comes before it
        fully_shard(block, **how)
    root = fully_shard(Root(model), **how)
    root(lambda: None)  # FSDP2's own preparations
    root.reshard()
    given = vars(policy) | {"head": describe(model, layer_of(model))}
    return ShardedPolicy(**given, root=root, saved=tuple(model.state_dict()))
