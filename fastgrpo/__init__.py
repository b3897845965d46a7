"""Exact fused GRPO losses from hidden states, without ever holding full-vocabulary logits."""

from fastgrpo.advantages import group_advantages
from fastgrpo.checks import checked
from fastgrpo.config import LossConfig
from fastgrpo.logps import TokenLogps, linear_logps
from fastgrpo.loss import FusedGRPOLoss, GRPOLoss, grpo_loss
from fastgrpo.normalizer import count_normalizer
from fastgrpo.tiles import default_workspace_mb

__version__ = "0.1.0"

__all__ = [
    "FusedGRPOLoss",
    "GRPOLoss",
    "LossConfig",
    "TokenLogps",
    "checked",
    "count_normalizer",
    "default_workspace_mb",
    "group_advantages",
    "grpo_loss",
    "linear_logps",
]
