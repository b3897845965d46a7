"""Advantages of completions and of tokens, without a critic; what is done to rewards before."""

from fastgrpo.advantages.of_completions import group_advantages
from fastgrpo.advantages.of_tokens import reinforce_plus_plus

__all__ = ["group_advantages", "reinforce_plus_plus"]
