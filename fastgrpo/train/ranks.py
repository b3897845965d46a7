"""Several processes that train one policy, each with its part of the prompts.

`torchrun` starts them, and every one holds the whole model. Gradients are averaged, so that a loss
is divided by the count of all processes over their number (`fastgrpo.count_normalizer`). Alone, a
process is rank 0 of 1, and nothing here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout, default_pg_timeout
from torch.distributed.tensor import DTensor

from .flags import Flags

Item = TypeVar("Item")


def rank() -> int:
    """Return this process's number; 0, the first, writes alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def group() -> dist.ProcessGroup | None:
    """Return the group of all processes; None if there is one."""
    return dist.group.WORLD if dist.is_initialized() else None


@contextmanager
def processes() -> Iterator[None]:
    """Context in which the processes that torchrun started know each other; the first prints.

    Clusters set WORLD_SIZE for a machine, too; torchrun alone gives a process its LOCAL_RANK there.
    """
    if "LOCAL_RANK" not in os.environ:
        if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise SystemExit(
                f"error: expected torchrun on each of several machines, got WORLD_SIZE {size} "
                "without a LOCAL_RANK"
            )
        yield
        return
    if (number := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if rank() > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
        yield


def check_device(device: str) -> None:
    """Raise ValueError unless each of several processes has a device of its own, or all the CPU."""
    if count() == 1 or device == "cpu":
        return
    if device not in ("auto", "cuda"):
        raise ValueError(
            f"device: expected cuda or cpu, as each of {count()} processes takes the GPU of its "
            f"number, got {device}"
        )
    gpus, number = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if 0 < gpus <= number:
        raise ValueError(
            f"device: expected a GPU for each process of this machine, which has {gpus}, got a "
            f"process of number {number}, counted from 0; --device cpu trains on CPUs"
        )


def check(config: Flags) -> None:
    """Raise ValueError for settings that several processes cannot have, or that one cannot."""
    check_device(config.device)
    if config.fsdp and not dist.is_initialized():
        raise ValueError(
            "fsdp: expected processes that torchrun has started, got one without torchrun"
        )
    if config.num_prompts < count():
        raise ValueError(
            f"num_prompts: expected one for each of {count()} processes, got {config.num_prompts}"
        )
    if count() > 1 and config.loss_config().aggregation == "token_sum":
        raise ValueError(
            f"loss: expected one that takes a mean, as {count()} processes average their gradients,"
            f" got {config.loss}, a sum over tokens"
        )
    if count() > 1 and config.loss_config().compares_sequences:
        raise ValueError(
            f"loss: expected one that does not compare the completions of a batch, which lie in "
            f"{count()} processes, got {config.loss}"
        )


def allow(seconds: float) -> None:
    """Have the processes wait for one another for so much longer than torch has them."""
    if dist.is_initialized():
        _set_pg_timeout(default_pg_timeout + timedelta(seconds=seconds))


def gathered(item: Item) -> list[Item]:
    """Return what each process gave, in the order of their ranks; tensors are on the CPU."""
    if not dist.is_initialized():
        return [item]
    found: list[Item] = [item] * count()
    dist.all_gather_object(found, item)
    return found


def of_first(action: Callable[[], Item]) -> Item:
    """Return what ``action`` returns in rank 0; what it raises as an OSError is raised in all."""
    done = error = None
    if rank() == 0:
        try:
            done = action()
        except OSError as raised:
            error = raised
    done, error = gathered((done, error))[0]
    if error is not None:
        raise error
    return done


def mean(number: float) -> float:
    """Return the mean of a number over the processes."""
    return sum(gathered(number)) / count()


def part(items: Sequence[Item]) -> Sequence[Item]:
    """Return this process's part of items: side by side, and of nearly equal sizes."""
    bounds = [len(items) * i // count() for i in (rank(), rank() + 1)]
    return items[slice(*bounds)]


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, the same bits in all.

    A part of a tensor (DTensor) stays: where its gradient is made, FSDP2 averages it.
    """
    if not dist.is_initialized():
        return
    for tensor in _whole(tensors):
        dist.all_reduce(tensor)
        tensor /= count()


@torch.no_grad()
def copy_first(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of rank 0; a part of a tensor (DTensor) stays."""
    if dist.is_initialized():
        for tensor in _whole(tensors):
            dist.broadcast(tensor, 0)


def _whole(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if not isinstance(tensor, DTensor))
