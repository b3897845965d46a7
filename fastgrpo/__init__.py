"""Exact fused GRPO losses from hidden states, without ever holding full-vocabulary logits."""

from fastgrpo.advantages import group_advantages, reinforce_plus_plus
from fastgrpo.checks import checked
from fastgrpo.config import LossConfig
from fastgrpo.corrections import rejection_mask
from fastgrpo.logps import TokenLogps, linear_logps
from fastgrpo.loss import FusedGRPOLoss, GRPOLoss, grpo_loss
from fastgrpo.normalizer import count_normalizer
from fastgrpo.rewards import (
    kl_penalty,
    length_penalty,
    mask_truncated_completions,
    soft_overlong_punishment,
    token_rewards,
)
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
    "kl_penalty",
    "length_penalty",
    "linear_logps",
    "rejection_mask",
    "mask_truncated_completions",
    "reinforce_plus_plus",
    "soft_overlong_punishment",
    "token_rewards",
]
