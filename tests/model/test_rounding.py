"""Under FSDP2 with bf16 parameters, what is fp32 per token stays so, or is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fastgrpo import FusedLM
from model_families import VOCAB, tiny

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
LOSS_MASK = (torch.arange(9) > 2).expand(2, 9)
ADVANTAGES = torch.tensor([1.0, -1.0])


@pytest.fixture
def sharded(alone):
    """Makes a FusedLM in bf16, sharded over a process group of one."""

    def make(**policy):
        lm = FusedLM(tiny("qwen2"))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, **policy)
        for layer in lm.model.model.layers:
            fully_shard(layer, mp_policy=policy)
        return fully_shard(lm, mp_policy=policy)

    return make


def test_the_ratio_of_a_policy_to_itself_is_one(sharded):
    lm = sharded(cast_forward_inputs=False)
    with torch.no_grad():
        old = lm(IDS, None, LOSS_MASK).logps
    assert old.dtype == torch.float32 and not torch.equal(old, old.bfloat16().float())
    out = lm(IDS, None, LOSS_MASK, ADVANTAGES, old_logps=old, config="dapo")
    out.loss.backward()
    assert out.metrics["ratio_min"] == 1 and out.metrics["ratio_max"] == 1
    assert out.logps.dtype == torch.float32 and torch.equal(out.logps, old)
    assert all(p.grad is not None for p in lm.parameters())


def test_rounded_inputs_are_refused(sharded):
    lm = sharded()  # cast_forward_inputs is True by default
    with pytest.raises(ValueError, match="expected float32, got torch.bfloat16.*cast_forward_inp"):
        lm(IDS, None, LOSS_MASK, ADVANTAGES)


def test_a_rounded_output_is_refused(sharded):
    lm = sharded(cast_forward_inputs=False, output_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="output_dtype: expected None or float32"):
        lm(IDS, None, LOSS_MASK, ADVANTAGES)


def test_a_sharded_model_is_refused_with_the_right_order(sharded):
    model = tiny("qwen2")
    fully_shard(model)
    with pytest.raises(ValueError, match=r"fully_shard of FusedLM\(model\)"):
        FusedLM(model)
