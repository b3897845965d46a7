"""The torch backend, for CPUs. A file with a twin of Triton launchers has the name of theirs.

Names, signatures and results are those of `fastgrpo_kernels`. Tiles may have any strides, and
float64 is supported. The caller handles everything vocabulary-sized in tiles
(`fastgrpo.head.loops`).
"""

from fastgrpo.torch_kernels.entry_softmax import entry_dots, entry_grads, segment_softmax
from fastgrpo.torch_kernels.group_advantages import group_stats
from fastgrpo.torch_kernels.logits_tile import (
    scatter_rows,
    tile_grad,
    tile_softmax,
    tile_stats,
)
from fastgrpo.torch_kernels.policy_loss import segment_reduce, token_loss
from fastgrpo.torch_kernels.sparse_entries import (
    bag_sum,
    entry_logits,
    sum_by_id,
    tile_draw,
    tile_draw_sum,
)
from fastgrpo_kernels import Head, Rows, matmul

# Kernels that keep logits in registers have no twin: the loops score tiles that fit in cache.
linear_logps_fwd = anchored_logps_fwd = linear_draw_fwd = None


def has_anchored(rows: Rows, head: Head) -> bool:
    """Return False: there is no anchored kernel here."""
    return False


__all__ = [
    "anchored_logps_fwd",
    "bag_sum",
    "entry_dots",
    "entry_grads",
    "entry_logits",
    "group_stats",
    "has_anchored",
    "linear_draw_fwd",
    "linear_logps_fwd",
    "matmul",
    "scatter_rows",
    "segment_reduce",
    "segment_softmax",
    "sum_by_id",
    "tile_draw",
    "tile_draw_sum",
    "tile_grad",
    "tile_softmax",
    "tile_stats",
    "token_loss",
]
