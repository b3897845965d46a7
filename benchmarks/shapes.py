"""Name the (rows, vocabulary, hidden) shapes that are measured."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One head: `rows` tokens as `sequences` completions of equal length."""

    name: str
    rows: int  # N, tokens
    vocab: int  # V
    hidden: int  # H
    sequences: int = 8  # B; divides rows

    @property
    def label(self) -> str:
        return f"{self.name} N={self.rows} V={self.vocab} H={self.hidden}"


# A vocabulary that is no multiple of any block, and one row count that is no power of two.
TINY_SHAPES = (Shape("tiny", 96, 1031, 48), Shape("small", 128, 2053, 96))

# A real head at which all peers take less than 90 s on two cores: SmolLM2's, with 512 tokens.
SMOLLM2_SHAPE = Shape("smollm2-135m", 512, 49152, 576)

# The shapes that the CPU backend is held to; the second is SmolLM2's head.
CPU_SHAPES = (
    Shape("32k", 2048, 32000, 512),
    Shape("49k", 2048, 49152, 576),
    Shape("152k", 1024, 151936, 896),
)

_HEADS = (
    ("qwen3-0.6b", 151936, 1024),
    ("qwen2.5-7b", 152064, 3584),
    ("llama-3-8b", 128256, 4096),
    ("gemma-3-4b", 262144, 2560),
)
CUDA_SHAPES = tuple(
    Shape(name, rows, vocab, hidden, sequences=rows // 512)
    for rows in (4096, 16384, 65536)
    for name, vocab, hidden in _HEADS
)

# What TRL issue #7244 asks for: a fused loss in 60-80 ms and about 6 GiB on an H100.
LARGE_SHAPE = Shape("trl-7244", 8192, 151936, 4096, sequences=16)
