"""Everything vocabulary-sized: log-probs and gradients of a linear head without its logits."""
