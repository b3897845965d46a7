"""AdamW in fp32 over a model of any precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import get_scheduler

from . import ranks
from .config import TrainConfig

RISING_STEPS = 20


class MasterAdamW:
    """AdamW on fp32 copies of 16-bit parameters; fp32 parameters are updated as they are.

    A bf16 weight of 0.02 cannot change by less than 8e-5, so steps of the usual size (1e-6) would
    be rounded away. Gradients of several backward passes are summed in fp32 too.

    Args:
        parameters: those that require a gradient are trained, fp32 or 16 bits.
        learning_rate: the highest.
        total_steps: at which "linear" and "cosine" reach 0.
        schedule: the name of a schedule of transformers that takes a warm-up: "linear", "cosine" or
            "constant_with_warmup".
        warmup_steps: over which the learning rate rises, while Adam's averages settle. The first
            step is 1 / warmup_steps of the highest, not 0.
        weight_decay: AdamW's.
        betas: AdamW's.

    Attributes:
        over_ranks: whether gradients are averaged over the processes before each step; by default
            they are not.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float,
        total_steps: int,
        *,
        schedule: str = "linear",
        warmup_steps: int = RISING_STEPS,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
    ) -> None:
        self.over_ranks = False
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters
        ]
        self.adamw = torch.optim.AdamW(
            self.masters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
        )
        skipped = min(1, warmup_steps)  # the step of a warm-up at which nothing is learnt
        planned = get_scheduler(schedule, self.adamw, warmup_steps, max(1, total_steps) + skipped)
        (factor,) = planned.lr_lambdas
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: factor(step + skipped)
        )

    @classmethod
    def of(cls, model: nn.Module, config: TrainConfig) -> MasterAdamW:
        """Return the optimizer of a run with these settings, over all its processes."""
        made = cls(
            model.parameters(),
            config.learning_rate,
            config.max_steps * config.num_iterations,
            schedule=config.lr_scheduler_type,
            warmup_steps=config.lr_warmup_steps,
        )
        made.over_ranks = True
        return made

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to those gathered since the last step."""
        loss.backward()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is not master and parameter.grad is not None:
                grad, parameter.grad = parameter.grad.float(), None
                master.grad = grad if master.grad is None else master.grad.add_(grad)

    def step(self, loss: float, max_grad_norm: float) -> float:
        """Clip the gradients, step, clear them; return the norm before clipping.

        A parameter that has no gradient counts as one with gradient 0, as where no completion had
        an advantage: Adam's averages decay, and the weights go on by them. If the loss or the norm
        is not finite, there is no step; the gradients are cleared anyway.
        """
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        if self.over_ranks:
            ranks.average(master.grad for master in self.masters)
        total = get_total_norm([master.grad for master in self.masters])
        if isinstance(total, DTensor):
            total = total.full_tensor()
        clip_grads_with_norm_(self.masters, max_grad_norm, total)
        norm = total.item()
        if math.isfinite(loss) and math.isfinite(norm):
            self.adamw.step()
            self.schedule.step()
            with torch.no_grad():
                copy_all(self.parameters, self.masters)
        self.clear()
        return norm

    def clear(self) -> None:
        """Forget the gradients gathered since the last step."""
        for parameter in self.parameters:
            parameter.grad = None
        self.adamw.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights in fp32, Adam's averages and the place in the schedule."""
        adamw = self.adamw.state_dict()
        averages = {str(i): state for i, state in adamw["state"].items()}
        return {
            "weights": self.masters,
            "adamw": adamw | {"state": averages},
            "schedule": self.schedule.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, of a model with the same parameters."""
        copy_all(self.masters, state["weights"])
        copy_all(self.parameters, self.masters)
        averages = {int(i): average for i, average in state["adamw"]["state"].items()}
        self.adamw.load_state_dict(state["adamw"] | {"state": averages})
        self.schedule.load_state_dict(state["schedule"])

    @property
    def updates(self) -> int:
        """The number of steps taken; those that were skipped do not count."""
        return self.schedule.last_epoch

    @property
    def learning_rate(self) -> float:
        """The next step's learning rate."""
        return self.schedule.get_last_lr()[0]


def copy_all(parameters: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Copy tensors into parameters, but none into itself; ValueError where shapes differ."""
    shapes = [[tuple(x.shape) for x in some] for some in (parameters, others)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"weights: expected shapes {shapes[0]}, got {shapes[1]}")
    for parameter, other in zip(parameters, others, strict=True):
        if parameter is not other:
            parameter.copy_(other)
