"""Updates on given completions, by one process or by several: `torchrun rank.py MODEL FILE`.

Several take them twice, as copies of the model and with the model in parts; rank 0 saves in FILE
the gradients, weights and metrics of both.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgrpo.train import ranks
from fastgrpo.train.completions import Rollout
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.load import load_policy
from fastgrpo.train.optimizer import MasterAdamW
from fastgrpo.train.sharded import shard

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import grpo_train

PROMPTS, GROUP, STEPS = 4, 3, 4


def completions(step: int) -> Rollout:
    """Four groups; one half has ten times as many tokens, all the advantages, or no finite loss."""
    g = torch.Generator().manual_seed(step)
    prompts = tuple(torch.randint(3, 250, (n,), generator=g) for n in (3, 7, 2, 5))
    lengths = torch.randint(1, 4, (PROMPTS * GROUP,), generator=g)
    advantages = torch.randn(PROMPTS * GROUP, generator=g)
    half = (slice(None, 6), slice(6, None))[step % 2]
    if step == 0:
        lengths[half] *= 10
    else:
        advantages[half] = 0
    tokens = int(lengths.sum())
    old_logps = torch.randn(tokens, generator=g) - 5.5
    if step == STEPS - 1:
        old_logps[0] = math.nan
    return Rollout(
        prompts,
        torch.arange(PROMPTS).repeat_interleave(GROUP),
        torch.randint(3, 250, (tokens,), generator=g),
        lengths,
        finished=torch.ones(PROMPTS * GROUP, dtype=torch.bool),
        old_logps=old_logps,
        advantages=advantages,
    )


def updates(model: str, fsdp: bool = False) -> dict[str, object]:
    """The gradients of each update that was taken, after clipping; all metrics; weights."""
    config = TrainConfig(
        task="sums", model=model, device="cpu", backend="torch", max_tokens_per_microbatch=40,
        learning_rate=1e-3, lr_warmup_steps=1, max_grad_norm=0.05, max_steps=STEPS, beta=0.0,
        loss="dapo", fsdp=fsdp,
    )  # fmt: skip
    policy = load_policy(config)
    if fsdp:
        policy = shard(policy)
    optimizer = MasterAdamW.of(policy.model, config)
    gradients, metrics = [], []
    optimizer.adamw.register_step_pre_hook(
        lambda *_: gradients.append(joined([p.grad for p in optimizer.masters]))
    )
    for step in range(STEPS):
        rollout = completions(step)
        mine = torch.isin(rollout.prompt_index, torch.tensor(list(ranks.part(range(PROMPTS)))))
        _, found = grpo_train.update(policy, optimizer, rollout[mine.nonzero()[:, 0]], config)
        metrics.append(found)
    averages = [state["exp_avg"] for state in optimizer.adamw.state.values()]
    return {
        "gradients": gradients,
        "weights": joined(optimizer.masters),
        "metrics": metrics,
        "shares": [share(tensors) for tensors in (policy.model.parameters(), averages)],
    }


def share(tensors: Iterable[Tensor]) -> float:
    """The part of all values that this process holds."""
    tensors = list(tensors)
    own = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(x.numel() for x in own) / sum(x.numel() for x in tensors)


def joined(tensors: list[Tensor]) -> Tensor:
    """Tensors as one of all their values."""
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in tensors]
    return torch.cat([x.detach().flatten() for x in whole])


if __name__ == "__main__":
    torch.set_num_threads(1)
    with ranks.processes():
        found = {form: updates(sys.argv[1], form == "parts") for form in ("copies", "parts")}
        if ranks.rank() == 0:
            torch.save(found, sys.argv[2])
