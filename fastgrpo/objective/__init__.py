"""What is optimised: the loss and its options, from log-probs to a loss and its derivative."""
