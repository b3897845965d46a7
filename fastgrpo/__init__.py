"""Exact fused GRPO losses from hidden states, without ever holding full-vocabulary logits."""

from fastgrpo.advantages import group_advantages, reinforce_plus_plus
from fastgrpo.advantages.reward_shaping import (
    kl_penalty,
    length_penalty,
    mask_truncated_completions,
    soft_overlong_punishment,
    token_rewards,
)
from fastgrpo.checks import checked
from fastgrpo.head.plan import default_workspace_mb
from fastgrpo.logps import TokenLogps, linear_logps
from fastgrpo.loss import FusedGRPOLoss, GRPOLoss, grpo_loss
from fastgrpo.model.fused_lm import FusedLM, head_of
from fastgrpo.model.head import ModelHead, UnsupportedHeadError
from fastgrpo.objective.aggregation import count_normalizer
from fastgrpo.objective.config import LossConfig
from fastgrpo.objective.corrections import rejection_mask
from fastgrpo.objective.registration import register_surrogate
from fastgrpo.selected import SelectedLogps, selected_logps
from fastgrpo.support import Support

__version__ = "0.2.0"

__all__ = [
    "FusedGRPOLoss",
    "FusedLM",
    "GRPOLoss",
    "LossConfig",
    "ModelHead",
    "SelectedLogps",
    "Support",
    "TokenLogps",
    "UnsupportedHeadError",
    "checked",
    "count_normalizer",
    "default_workspace_mb",
    "group_advantages",
    "grpo_loss",
    "head_of",
    "kl_penalty",
    "length_penalty",
    "linear_logps",
    "mask_truncated_completions",
    "register_surrogate",
    "reinforce_plus_plus",
    "rejection_mask",
    "selected_logps",
    "soft_overlong_punishment",
    "token_rewards",
]
