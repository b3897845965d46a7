"""The embedded task: addition. Tokenizer, model and data are made here, without a download."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from .rewards import Accuracy, Reward, one_by_one
from .tasks import Example, Task

MOST_SLIPS = 0.7
EQUAL = one_by_one(lambda completion, answer: float(completion == answer))


def arithmetic_task(seed: int, eval_size: int) -> Task:
    """Return sums such as 347+8; held-out sums are neither demonstrated nor trained on.

    The demonstrations come from a careless teacher. It counts on from the first number, and the
    further it counts the more often its answer is one too small. A model that imitates it gets most
    sums wrong, but the right answer is now and then among its samples. Reinforcement learning has
    to find it there. ValueError if ``eval_size`` leaves nothing to train on.
    """
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(100, 1000) for b in range(10)]
    if eval_size >= len(pairs):
        raise ValueError(f"eval_size: expected below {len(pairs)}, got {eval_size}")
    rng.shuffle(pairs)
    examples = [Example(f"{a}+{b}=", str(a + b)) for a, b in pairs]
    taught = [
        Example(f"{a}+{b}=", str(a + b - (rng.random() < min(0.2 * b, MOST_SLIPS))))
        for a, b in pairs
    ]
    return Task(
        "arithmetic",
        train=examples[eval_size:],
        held_out=examples[:eval_size],
        rewards=(Reward("correct", EQUAL),),
        accuracy=Accuracy(EQUAL),
        demonstrations=taught[eval_size:],
    )


def character_tokenizer(alphabet: str = "0123456789+=") -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character of ``alphabet``, and two special tokens."""
    # The end token has Qwen2's name: for a checkpoint of tiny_model, AutoTokenizer chooses Qwen2's
    # tokenizer class.
    vocab = {token: i for i, token in enumerate(["<pad>", "<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|endoftext|>",
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return a Qwen2-shaped model of 0.4M parameters, drawn from torch's global generator."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            # Wider than the usual 0.02: such a small model then learns several times faster.
            initializer_range=0.05,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
