"""Advantages of completions and of tokens, without a critic; what is done to rewards before."""
