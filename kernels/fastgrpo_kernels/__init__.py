"""Triton kernels of fastgrpo and their launchers. Imports torch and triton only.

Callers pack: rows that a mask or an ignored id leaves out never reach a launcher. Mathematics,
memory and tiling: kernels/README.md.
"""

from .group_advantages import GroupStats, group_stats
from .linear_logps import linear_logps_fwd
from .logits_tile import RowState, scatter_rows, tile_grad, tile_stats
from .policy_loss import STATS, segment_reduce, token_loss

ROW_MAJOR_TILES = True  # one program reads one row of a tile

__all__ = [
    "ROW_MAJOR_TILES",
    "STATS",
    "GroupStats",
    "RowState",
    "group_stats",
    "linear_logps_fwd",
    "scatter_rows",
    "segment_reduce",
    "tile_grad",
    "tile_stats",
    "token_loss",
]
