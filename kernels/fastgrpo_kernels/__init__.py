"""Triton kernels of fastgrpo and their launchers. Imports torch and triton only.

Callers pack: masked rows and rows with an ignored id never reach a launcher. Mathematics, memory
and tiling: kernels/README.md. The types of the arguments: `operands`.
"""

from .anchored_logps import Anchored, Marks, anchored_logps_fwd, has_anchored, mask_words
from .entry_softmax import entry_dots, entry_grads, segment_softmax
from .group_advantages import GroupStats, group_stats
from .linear_logps import linear_logps_fwd
from .logits_tile import scatter_rows, tile_grad, tile_stats
from .matmul import matmul
from .operands import Draw, EntryList, Head, Logps, Rows, RowState, Tile, Upstream
from .policy_loss import STATS, TokenObjective, Tokens, TokenTerms, segment_reduce, token_loss
from .sparse_entries import (
    WORD_BITS,
    Kept,
    bag_sum,
    entry_logits,
    linear_draw_fwd,
    sum_by_id,
    tile_draw,
)

tile_draw_sum = None  # `linear_draw_fwd` scores and draws at once
tile_softmax = None  # `anchored_logps_fwd` leaves exponentials, without logits in memory

__all__ = [
    "STATS",
    "WORD_BITS",
    "Anchored",
    "Draw",
    "EntryList",
    "GroupStats",
    "Head",
    "Kept",
    "Logps",
    "Marks",
    "RowState",
    "Rows",
    "Tile",
    "TokenObjective",
    "TokenTerms",
    "Tokens",
    "Upstream",
    "anchored_logps_fwd",
    "bag_sum",
    "entry_dots",
    "entry_grads",
    "entry_logits",
    "group_stats",
    "has_anchored",
    "linear_draw_fwd",
    "linear_logps_fwd",
    "mask_words",
    "matmul",
    "scatter_rows",
    "segment_reduce",
    "segment_softmax",
    "sum_by_id",
    "tile_draw",
    "tile_draw_sum",
    "tile_softmax",
    "tile_grad",
    "tile_stats",
    "token_loss",
]
