"""Critic-free advantages of completions and of tokens, and the shaping of rewards before them."""

from fastgrpo.advantages.of_completions import group_advantages
from fastgrpo.advantages.of_tokens import reinforce_plus_plus

__all__ = ["group_advantages", "reinforce_plus_plus"]
