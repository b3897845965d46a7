"""`FastGRPOTrainer`: TRL's trainer, with the loss of `grpo_loss` in its model's forward."""

from __future__ import annotations

import dataclasses

from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers.utils import ModelOutput
from trl import GRPOTrainer

from fastgrpo.integrations.trl.chunked_head import patch, say_once
from fastgrpo.integrations.trl.fused_loss import FusedLoss, add_fused_loss
from fastgrpo.integrations.trl.settings import Inputs, NotFused, accumulation_steps


class FastGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with the loss of `fastgrpo.grpo_loss`.

    It takes what `GRPOTrainer` takes, and logs what it logs. Loss and gradients are TRL's but for
    rounding. All log-probs are those of `fastgrpo.linear_logps`, as under `patch`.

    It runs under DDP and FSDP2, and trains LoRA. A head that is trained, and that FSDP2 shards as a
    unit of its own, raises at the first loss.

    Where a setting has no equal in `LossConfig`, TRL's own loss runs on these log-probs, and a
    warning names the setting once.

    Raises:
        RuntimeError: as `patch` and what stands under it do.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        with patch():  # raises before a model is loaded
            super().__init__(*args, **kwargs)
        peft = is_peft_model(self.model)
        add_fused_loss(self.model.get_base_model() if peft else self.model)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Log-probs and the loss leave a model that FSDP2 shards as its outputs. Rounded to 16 bits,
        # those of the old policy would not be the ones in the loss.
        plugin = self.accelerator.state.fsdp_plugin if self.accelerator.is_fsdp2 else None
        if plugin is not None and plugin.mixed_precision_policy is not None:
            policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)
            plugin.mixed_precision_policy = policy

    def _get_per_token_logps_and_entropies(
        self, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with patch():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: Inputs) -> Tensor:
        try:
            fused = FusedLoss(self, inputs)
        except NotFused as setting:
            say_once(f"{setting}: TRL's own loss runs, on log-probs of linear_logps")
            return super()._compute_loss(model, inputs)
        made = []

        def forward(**kwargs: object) -> ModelOutput:
            made.append(model(**kwargs, fused_loss=fused))
            return made[-1]

        # TRL's formula on log-probs without gradient: its loss is dropped, what it logs stays.
        super()._compute_loss(forward, inputs)
        (outputs,) = made
        loss = outputs.loss
        if self.aux_loss_enabled:
            weight = self.router_aux_loss_coef / accumulation_steps(self)
            loss = loss + weight * outputs.aux_loss
        return loss
