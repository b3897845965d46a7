"""Shared by the tests of `support=`: what was kept, in every form that a row can have."""

from __future__ import annotations

import torch

from fastgrpo import Support


def kept_masks(ids, vocab, seed=0):
    """(..., V) bool with the target: alone, among few, among many, of all, row after row in turn.

    Every fifth row keeps nothing, which stands for the whole vocabulary.
    """
    g = torch.Generator().manual_seed(seed)
    flat = ids.flatten()
    most = {0: 0, 1: 3, 2: vocab // 2, 3: vocab, 4: 0}
    kept = torch.zeros(len(flat), vocab, dtype=torch.bool)
    for i, token in enumerate(flat.tolist()):
        others = torch.randperm(vocab, generator=g)[: most[i % 5]]
        kept[i, others] = True
        kept[i, token] = i % 5 != 4
    return kept.view(*ids.shape, vocab)


def support_of(kept, ids):
    """The same as lists, the target last, so that a row that keeps all has all ids."""
    lists = []
    for row, token in zip(kept.flatten(0, -2), ids.flatten().tolist(), strict=True):
        others = [v for v in reversed(row.nonzero()[:, 0].tolist()) if v != token]
        lists.append([*others, token] if row.any() else [])
    return Support.of_lists(lists, torch.ones(ids.shape, dtype=torch.bool))


def whole_where_nothing(kept):
    """The mask that the oracle takes."""
    return kept | ~kept.any(-1, keepdim=True)
