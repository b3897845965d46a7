"""Critic-free advantages of completions and of tokens, and the shaping of rewards before them."""
