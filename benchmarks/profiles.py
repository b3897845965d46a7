"""What the rows of a policy's head look like: entropy, tails, kept entries, the curve itself.

The cost of a sparse backward depends on the number of entries that a row keeps. A random batch
cannot tell that number. `profile_model.py` measures it on a real model and records it, and
`data.profile_batch` puts rows of the recorded kind on a head of any shape.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.environment import RESULTS

TAUS = (1e-4, 1e-3, 1e-2)
MASS_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
TOP_P, TOP_K = 0.95, 512  # a sampler's usual truncation


class RowStats(NamedTuple):
    """What is known of N rows of logits."""

    entropy: Tensor  # (N,) nats
    mass: Tensor  # (N, len(MASS_RANKS)): of the row's most probable entries, by their number
    kept: Tensor  # (N, len(TAUS)): expected entries that a sparse backward keeps
    nucleus: Tensor  # (N,): entries that top-p and top-k leave to a sampler
    curve: Tensor  # (N, len(curve_ranks(V))): log-probs in falling order, nats


def curve_ranks(vocab: int) -> list[int]:
    """Return the ranks, from 1, at which a row's curve is recorded: the first 16, then by 1.3."""
    ranks = list(range(1, min(16, vocab) + 1))
    while ranks[-1] < vocab:
        ranks.append(min(vocab, math.ceil(ranks[-1] * 1.3)))
    return ranks


@torch.no_grad()
def row_statistics(hidden: Tensor, weight: Tensor, *, scale: float = 1.0) -> RowStats:
    """Return the statistics of the rows softmax(scale * hidden @ weight.T); hidden is (N, H).

    An entry is kept with probability min(1, p / tau), so the expected number is exact.
    """
    vocab = weight.shape[0]
    at = torch.tensor(curve_ranks(vocab), device=weight.device) - 1
    masses = torch.tensor([min(rank, vocab) - 1 for rank in MASS_RANKS], device=weight.device)
    blocks = []
    for block in hidden.split(max(1, (1 << 25) // vocab)):
        logp = (scale * (block.float() @ weight.float().T)).log_softmax(-1)
        logp = logp.sort(-1, descending=True).values
        p = logp.exp()
        cumulated = p.cumsum(-1)
        kept = torch.stack([(p / tau).clamp(max=1).sum(-1) for tau in TAUS], -1)
        # An entry is in the nucleus if those before it have less than TOP_P of the mass.
        nucleus = (cumulated[:, : TOP_K - 1] < TOP_P).sum(-1) + 1
        entropy = -(p * logp).sum(-1)
        blocks.append(RowStats(entropy, cumulated[:, masses], kept, nucleus, logp[:, at]))
    return RowStats(*(torch.cat(parts).cpu() for parts in zip(*blocks, strict=True)))


@torch.no_grad()
def expected_kept(hidden: Tensor, weight: Tensor, tau: float = 1e-3) -> float:
    """Return the mean number of entries that a sparse backward keeps of a row."""
    total = 0.0
    for block in hidden.split(256):
        p = (block.float() @ weight.float().T).softmax(-1)
        total += (p / tau).clamp(max=1).sum().item()
    return total / len(hidden)


class Profile(NamedTuple):
    """Rows of a policy in the order of their entropy, least first, and the record they are from."""

    curves: Tensor  # (rows, len(ranks)): log-probs in falling order, nats
    ranks: list[int]  # from 1 to the model's vocabulary
    source: str

    def extended(self, vocab: int) -> Tensor:
        """Return the log-probs (rows, vocab) of rows like these, in falling order.

        Between recorded ranks log p is linear in the logarithm of the rank. In a smaller vocabulary
        the row ends early. In a larger one it goes on, from the middle of the model's vocabulary,
        by the power law that it follows there: an extrapolation. Either is normalised.
        """
        known, curves, own = self.ranks, self.curves, self.ranks[-1]
        if vocab > own:
            upto = sum(rank <= own // 2 for rank in known)
            early = sum(rank <= own // 8 for rank in known) - 1
            known, curves = known[:upto], curves[:, :upto]
            fall = (curves[:, -1] - curves[:, early]) / math.log(known[-1] / known[early])
            last = curves[:, -1] + fall * math.log(vocab / known[-1])
            known, curves = [*known, vocab], torch.cat((curves, last[:, None]), 1)
        at = torch.tensor(known, dtype=curves.dtype, device=curves.device)
        ranks = torch.arange(1, vocab + 1, dtype=curves.dtype, device=curves.device)
        right = torch.searchsorted(at, ranks).clamp(min=1)
        share = (ranks / at[right - 1]).log() / (at[right] / at[right - 1]).log()
        return torch.lerp(curves[:, right - 1], curves[:, right], share).log_softmax(-1)


def newest_profile(policy: str, results: Path = RESULTS) -> Profile:
    """Return the rows of a policy in the newest profile: "temperature 1", "temperature 0.6", ...

    Raises FileNotFoundError without a record, KeyError if it does not have the policy.
    """
    path, record = newest_record(results)
    found = {p["name"]: p for p in record["policies"]}[policy]
    return Profile(torch.tensor(found["curves"]), found["ranks"], f"{path.name}, {policy}")


def newest_record(results: Path = RESULTS) -> tuple[Path, dict[str, Any]]:
    """Return path and content of the profile with the latest date."""
    found = [(path, json.loads(path.read_text())) for path in results.glob("profile-*.json")]
    if not found:
        raise FileNotFoundError(f"no profile-*.json in {results}: see benchmarks.profile_model")
    return max(found, key=lambda item: item[1]["date"])
