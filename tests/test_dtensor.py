"""DTensors are refused by name: their gradients would not be reduced."""

from __future__ import annotations

import pytest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import fastgrpo
from fastgrpo.testing import make_batch
from model_families import tiny


@pytest.mark.parametrize("name", ["hidden", "weight", "completion_ids", "advantages", "old_logps"])
def test_a_tensor_of_a_loss(name, alone):
    batch = make_batch()
    given = dict(zip(batch._fields, batch, strict=True))
    given[name] = distribute_tensor(given[name], init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(ValueError, match=rf"^{name}: expected a plain tensor, got a DTensor; "):
        fastgrpo.grpo_loss(**given, config="trl_dapo")


@pytest.mark.parametrize("name", ["hidden", "weight", "token_ids"])
def test_a_tensor_of_log_probs(name, alone):
    batch = make_batch()
    given = {"hidden": batch.hidden, "weight": batch.weight, "token_ids": batch.completion_ids}
    given[name] = distribute_tensor(given[name], init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(ValueError, match=rf"^{name}: expected a plain tensor, got a DTensor; "):
        fastgrpo.linear_logps(**given)


def test_a_head_that_is_sharded(alone):
    model = fully_shard(tiny("qwen2"))
    with pytest.raises(ValueError, match=r"^model: expected a head that is not sharded.*FusedLM"):
        fastgrpo.head_of(model)
