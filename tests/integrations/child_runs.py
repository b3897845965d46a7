"""Runs of TRL's trainers and of ours in processes of their own: see test_trl_child_processes."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch
import trl
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer

from fastgrpo.integrations.trl import FastGRPOTrainer, fused_loss, patch
from trl_runs import LORA, grpo, logged

# The model's folder, what goes to GRPOConfig, and LoRA's settings.
COPY = {**LORA, "modules_to_save": ["lm_head"]}
CASES = {
    "dapo": ("tied", {"loss_type": "dapo"}, None),
    "grpo": ("untied", {"loss_type": "grpo"}, None),
    "lora": ("tied", {"loss_type": "dapo"}, LORA),
    "copy of the head": ("untied", {"loss_type": "dapo"}, COPY),
    "bf16": ("tied", {"loss_type": "dapo", "bf16": True}, None),
}
RUNS = {
    "alone": ("dapo", "grpo", "lora"),
    "ddp": ("grpo", "lora"),
    "fsdp": ("dapo", "grpo", "lora", "copy of the head", "bf16"),
}
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"],
    },
}


def allow_fsdp_on_cpus() -> None:
    """Make accelerate shard where it would pass over the request, as it does on CPUs."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: object, fsdp_plugin=None, **kwargs: object) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def whole(parameter: Tensor) -> Tensor:
    local = parameter.detach()
    return local.full_tensor() if isinstance(local, DTensor) else local


def run(trainer: type, folder: Path, output: Path, lora, **settings) -> dict[str, object]:
    """Train; return what is logged, the parameters, and how far `grpo_loss` finds the policy from
    the old one, for each of its calls; or the error.
    """
    gaps, original = [], fused_loss.grpo_loss

    def spy(hidden, weight, ids, mask, *rest, old_logps, **options):
        out = original(hidden, weight, ids, mask, *rest, old_logps=old_logps, **options)
        gaps.append((out.logps - old_logps)[mask].abs().max().item())
        return out

    made = grpo(
        trainer, folder, output, max_steps=4, beta=0.04, num_iterations=2,
        gradient_accumulation_steps=2, ddp_backend="gloo" if "RANK" in os.environ else None,
        peft_config=LoraConfig(**lora) if lora else None, **settings,
    )  # fmt: skip
    assert made.is_fsdp_enabled == ("fsdp" in settings), "accelerate passed over it"
    fused_loss.grpo_loss = spy
    try:
        made.train()
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        fused_loss.grpo_loss = original
    parameters = torch.cat([whole(p).flatten() for p in made.model.parameters()])
    ranks = made.accelerator.num_processes
    return {"logged": logged(made), "parameters": parameters, "gaps": gaps, "ranks": ranks}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sharding, output = sys.argv[1], Path(sys.argv[2])
    allow_fsdp_on_cpus()
    results = {"version": trl.__version__}
    for name in RUNS[sharding]:
        model, settings, lora = CASES[name]
        settings = {**settings, **(FSDP if sharding == "fsdp" else {})}
        for kind, trainer, context in (
            ("stock", GRPOTrainer, contextlib.nullcontext),
            ("patched", GRPOTrainer, patch),
            ("fused", FastGRPOTrainer, contextlib.nullcontext),
        ):
            with context():
                results[name, kind] = run(trainer, output / model, output, lora, **settings)
    torch.save(results, output / f"rank{os.environ.get('RANK', 0)}.pt")
