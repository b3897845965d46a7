"""From a causal language model to its loss: the verified head, and a module around the model."""
