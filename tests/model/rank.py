"""One process of several that train one model: `torchrun ... rank.py CASE FOLDER`.

Alone it trains on the whole batch. The last parameters go to FOLDER/CASE-<processes>.pt.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastgrpo import FusedLM, GRPOLoss, Support, grpo_loss
from model_families import VOCAB, tiny

STEPS, MICRO_BATCHES = 2, 2


def batches(case: str, step: int) -> list[tuple[torch.Tensor, ...]]:
    """The micro-batches of a step: tokens, masks, advantages and old log-probs of 4 sequences."""
    g = torch.Generator().manual_seed(step)
    found = []
    for _ in range(MICRO_BATCHES):
        ids = torch.randint(3, VOCAB, (4, 9), generator=g)
        start = torch.tensor([0, 3, 1, 2])[:, None]
        mask = torch.arange(9) >= start
        loss_mask = torch.arange(9) > start + 2
        if "empty" in case:
            loss_mask[1::2] = False  # the second process has nothing to train on
        old = -4 + torch.randn(4, 9, generator=g)
        found.append((ids, mask.long(), loss_mask, torch.randn(4, generator=g), old))
    return found


def drawn_from(ids: torch.Tensor, loss_mask: torch.Tensor) -> Support:
    """Most of the vocabulary beside each trained token, all of it beside some."""
    kept = torch.rand(*ids.shape, VOCAB, generator=torch.Generator().manual_seed(0)) < 0.8
    kept = kept.scatter(-1, ids[..., None], True) & (loss_mask & (ids % 4 > 0))[..., None]
    return Support.of_mask(kept)


def with_lora(model: nn.Module) -> nn.Module:
    """Adapters on a layer of the backbone and on the head, which change it from the start."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
    return peft.get_peft_model(model, config)


class Gathered(nn.Module):
    """A head that is sharded by hand, and gathered by what the error says of it."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("states", torch.randn(VOCAB, 8, generator=g))
        weight = torch.randn(VOCAB, 8, generator=g)
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (1, dist.get_world_size()))
            weight = distribute_tensor(weight, mesh, [Replicate(), Shard(0)])
        self.weight = nn.Parameter(weight)

    def forward(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor,
        loss_mask: torch.Tensor,
        advantages: torch.Tensor,
        *,
        old_logps: torch.Tensor,
        **options: object,
    ) -> GRPOLoss:
        def loss(weight: torch.Tensor) -> GRPOLoss:
            return grpo_loss(
                self.states[ids[:, :-1]], weight, ids[:, 1:], loss_mask[:, 1:], advantages,
                old_logps=old_logps[:, 1:], **options,
            )  # fmt: skip

        if not dist.is_initialized():
            return loss(self.weight)
        try:
            loss(self.weight)
        except ValueError as error:
            recipe = re.search("gather it with (.*), or", str(error))[1]
        return loss(eval(recipe, {"weight": self.weight, "Partial": Partial}))


def wrapped(case: str) -> nn.Module:
    if case == "gathered":
        return Gathered()
    model = tiny("qwen2", tie_word_embeddings="tied" in case)
    lm = FusedLM(with_lora(model) if "lora" in case else model)
    if not dist.is_initialized():
        return lm
    if case.startswith("ddp"):
        return DistributedDataParallel(lm)
    fp32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=fp32)
    if "own-unit" in case:
        fully_shard(model.lm_head, mp_policy=fp32)
    return fully_shard(lm, mp_policy=fp32)


def main(case: str, folder: str) -> None:
    torch.use_deterministic_algorithms(True)
    world, rank = 1, 0
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        world, rank = dist.get_world_size(), dist.get_rank()
    lm = wrapped(case)
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.5)
    for step in range(STEPS):
        parts = batches(case, step)
        normalizer = sum(int(loss_mask.sum()) for _, _, loss_mask, _, _ in parts) / world
        for index, part in enumerate(parts):
            ids, mask, loss_mask, advantages, old = (x[rank::world] for x in part)
            if "deferred" in case and dist.is_initialized():
                last = index == len(parts) - 1
                if case.startswith("ddp"):
                    lm.require_backward_grad_sync = last
                else:
                    lm.set_requires_gradient_sync(last)
            kept = None
            if "support" in case:
                kept = drawn_from(part[0], part[2]).select(slice(rank, None, world))
            out = lm(
                ids, mask, loss_mask, advantages, old_logps=old, config="dapo",
                normalizer=normalizer, support=kept,
            )  # fmt: skip
            out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(lm, options=options)
    if rank == 0:
        torch.save(state, Path(folder) / f"{case}-{world}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
