"""`count_normalizer` over micro-batches, and over ranks whose gradients are averaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgrpo
from fastgrpo import LossConfig

MASKS = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(), torch.tensor([[1, 1, 1]]).bool()
ROOT = Path(__file__).parent.parent


def test_what_is_counted():
    count = fastgrpo.count_normalizer
    assert count(MASKS, "dapo") == 6 and count(MASKS[0], "dapo") == 3
    assert count(MASKS, "grpo") == count(MASKS, "luspo") == 3
    assert count(MASKS, LossConfig.preset("dr_grpo", max_completion_length=5)) == 15
    prompts = LossConfig(aggregation="prompt_mean")
    assert count([*MASKS, MASKS[1]], prompts, group_size=2) == 2
    assert count(MASKS[0].flatten(), "dapo") == 3
    assert count(torch.zeros(2, 3, dtype=torch.bool), "dapo") == 1


ERRORS = {
    "max_completion_length": dict(config="dr_grpo"),
    "at least one mask": dict(completion_masks=[]),
    "completion_masks: expected dtype": dict(completion_masks=torch.ones(2, 3)),
    r"completion_masks: expected shape \(B, T\)": dict(completion_masks=MASKS[0][0]),
    "a denominator, got 'token_sum'": dict(config="importance_sampling"),
    "group_size has no effect with aggregation='token_mean'": dict(config="dapo", group_size=2),
    "group_size: expected a divisor of the 3 completions, got 2": dict(
        config=LossConfig(aggregation="prompt_mean"), group_size=2
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        fastgrpo.count_normalizer(**{"completion_masks": MASKS, **ERRORS[message]})


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
import fastgrpo
from fastgrpo import LossConfig
from fastgrpo.testing import make_batch

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
batch = make_batch(sequences=6)
ranks = [[slice(0, 1), slice(1, 3)], [slice(3, 6)]]  # two micro-batches, and one

def gradient(rows, config, **options):
    weight = batch.weight.clone().requires_grad_()
    out = fastgrpo.grpo_loss(batch.hidden[rows], weight, *(x[rows] for x in batch[2:5]),
                             old_logps=batch.old_logps[rows], config=config, **options)
    return torch.autograd.grad(out.loss, weight)[0]

for name, options in (("dapo", {}), ("grpo", {}), ("dr_grpo", {"max_completion_length": 9})):
    config = LossConfig.preset(name, **options)
    masks = [batch.completion_mask[rows] for rows in ranks[rank]]
    normalizer = fastgrpo.count_normalizer(masks, config, process_group=dist.group.WORLD)
    mine = sum(gradient(rows, config, normalizer=normalizer) for rows in ranks[rank])
    dist.all_reduce(mine)
    torch.testing.assert_close(mine / 2, gradient(slice(0, 6), config), atol=1e-6, rtol=1e-5)
dist.destroy_process_group()
"""


def test_averaged_gradients_of_two_ranks_are_those_of_one(tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "store")], env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def test_what_is_no_config_and_no_size():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="config: expected a preset's name .* got None"):
        fastgrpo.count_normalizer(mask, None)
    config = LossConfig(aggregation="prompt_mean")
    with pytest.raises(ValueError, match="group_size: expected a divisor .* got True"):
        fastgrpo.count_normalizer(mask, config, group_size=True)
