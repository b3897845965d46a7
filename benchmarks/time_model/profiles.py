"""What a policy's rows look like: entropy, tail mass, kept entries; and batches that look alike.

The cost of a sparse backward depends on the number of entries that a row keeps. A random batch
cannot tell that number. `workload.py` measures it on a trained model, and `rl_like_batch` puts rows
of the measured kind on a head of any shape.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.data import LossInputs
from benchmarks.environment import RESULTS
from benchmarks.shapes import Shape

TAUS = (1e-4, 1e-3, 1e-2)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
LARGER_VOCABS = (131072, 151936, 262144)


class RowStats(NamedTuple):
    """What is known of N rows of logits; probabilities are those at temperature 1."""

    entropy: Tensor  # (N,) nats
    mass: Tensor  # (N, len(RANKS)): of the row's most probable entries, by their number
    kept: Tensor  # (N, len(TAUS)): expected entries that a sparse backward keeps
    kept_larger: Tensor  # (N, len(LARGER_VOCABS), len(TAUS)): the tail continued to more entries


@torch.no_grad()
def row_statistics(hidden: Tensor, weight: Tensor, *, scale: float = 1.0) -> RowStats:
    """Return the statistics of the rows softmax(scale * hidden @ weight.T); hidden is (N, H).

    An entry is kept with probability min(1, p / tau). For a larger vocabulary the row is continued
    behind its last entry, by the power law that it follows between ranks V/8 and V/2, and
    normalised again. Wherever this is shown it is called an extrapolation.
    """
    blocks = []
    for block in hidden.split(max(1, (1 << 25) // weight.shape[0])):
        logp = (scale * (block.float() @ weight.float().T)).log_softmax(-1)
        p = logp.exp()
        entropy = -(p * logp).sum(-1)
        p = p.sort(-1, descending=True).values
        ranks = torch.tensor([min(rank, p.shape[1]) - 1 for rank in RANKS], device=p.device)
        kept = torch.stack([(p / tau).clamp(max=1).sum(-1) for tau in TAUS], -1)
        larger = torch.stack([_kept_after(p, behind) for behind in _masses_behind(p)], 1)
        blocks.append(RowStats(entropy, p.cumsum(-1)[:, ranks], kept, larger))
    return RowStats(*(torch.cat(parts).cpu() for parts in zip(*blocks, strict=True)))


@torch.no_grad()
def expected_kept(hidden: Tensor, weight: Tensor, tau: float = 1e-3) -> float:
    """Return the mean number of entries that a sparse backward keeps of a row."""
    total = 0.0
    for block in hidden.split(256):
        p = (block.float() @ weight.float().T).softmax(-1)
        total += (p / tau).clamp(max=1).sum().item()
    return total / len(hidden)


def _masses_behind(p: Tensor) -> list[Tensor]:
    """Return, for each larger vocabulary, the mass (N,) that a row's power law puts behind V."""
    vocab = p.shape[1]
    early, late = vocab // 8, vocab // 2
    # From underflowed rows the power law is taken as steep as floats can tell.
    tiny = torch.finfo(p.dtype).tiny
    slope = (p[:, early - 1].clamp(min=tiny) / p[:, late - 1].clamp(min=tiny)).log()
    slope = slope / math.log(late / early) + 1e-6  # no row is exactly harmonic
    first = vocab / late
    masses = []
    for larger in LARGER_VOCABS:
        last = max(larger, vocab) / late
        integral = (last ** (1 - slope) - first ** (1 - slope)) / (1 - slope)
        masses.append(p[:, late - 1] * late * integral)
    return masses


def _kept_after(p: Tensor, behind: Tensor) -> Tensor:
    """Return the kept entries (N, taus) of rows p with the mass `behind` them, all of it small."""
    total = 1 + behind
    kept = [(p / (total[:, None] * tau)).clamp(max=1).sum(-1) for tau in TAUS]
    return torch.stack([k + behind / (total * tau) for k, tau in zip(kept, TAUS, strict=True)], -1)


class Profile(NamedTuple):
    """Rows of a policy in the order of their entropy, least first, and the record they are from."""

    mass: Tensor  # (rows, len(RANKS))
    source: str


def newest_profile(policy: str, results: Path = RESULTS) -> Profile:
    """Return the rows of a policy in the newest workload record: "as trained", "sharpened 2", ...

    Raises FileNotFoundError without a record, KeyError if it does not have the policy.
    """
    path, record = newest_workload(results)
    rows = {p["name"]: p["mass_rows"] for p in record["policies"]}[policy]
    return Profile(torch.tensor(rows, dtype=torch.float64), f"{path.name}, {policy}")


def newest_workload(results: Path = RESULTS) -> tuple[Path, dict[str, Any]]:
    """Return path and content of the workload record with the latest date."""
    found = [(path, json.loads(path.read_text())) for path in results.glob("workload-*.json")]
    if not found:
        raise FileNotFoundError(
            f"no workload-*.json in {results}: python -m benchmarks.time_model.workload"
        )
    return max(found, key=lambda item: item[1]["date"])


def rl_like_batch(
    shape: Shape,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    profile: Profile,
    seed: int = 0,
) -> LossInputs:
    """Return a batch whose rows have the probabilities of `profile`'s, at a head of any shape.

    A row's most probable entries, up to 128, get the probabilities that the measured row has at
    their ranks. The rest of its mass lies lognormally over the whole vocabulary. Tokens are drawn
    from the row. The number of kept entries must be measured on the batch: it is near the
    profile's, and not the same.

    The peaks of a row need a direction in common. Without one, a state that lifts a hundred logits
    would be so long that the other logits scatter. So the rows of the weight form classes, as
    related words do, and those of a class share a direction. Its tokens stand anywhere in the
    vocabulary.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    n, v, h = shape.rows, shape.vocab, shape.hidden
    peaks = 1 << (min(128, h // 4, v // 4).bit_length() - 1)
    token = torch.randperm(v, generator=generator, device=device)  # class-major
    weight = torch.empty(v, h, device=device)
    classes = normal(-(-v // peaks), h)
    spread = torch.arange(v, device=device) // peaks
    weight[token] = (classes[spread] + normal(v, h)) / math.sqrt(2 * h)
    weight = weight.to(dtype)

    # The rows of the profile in turn, in an order that leaves none out of any completion.
    chosen = torch.randperm(n, generator=generator, device=device) % len(profile.mass)
    p = _peak_probabilities(profile.mass, peaks).clamp(min=1e-10)  # what a record can tell from 0
    rest = (1 - p.sum(-1)).clamp(min=1e-9)
    p, rest = (x.to(device, torch.float32)[chosen] for x in (p, rest))  # (n, peaks), (n,)
    pool = torch.randint(v // peaks, (n,), generator=generator, device=device)
    entries = token[pool[:, None] * peaks + torch.arange(peaks, device=device)]  # (n, peaks)

    hidden = torch.empty(n, h, device=device)
    for rows in torch.arange(n, device=device).split(256):
        own = weight[entries[rows]].float()  # (rows, peaks, H)
        gram = own @ own.mT
        noise = 0.5 * normal(len(rows), h)
        level = p[rows].log() - rest[rows, None].log() + math.log(v)
        state = noise
        # The longer the state, the more the mass of the other logits. In a head too narrow for the
        # row that would have no end: it comes out flatter.
        for _ in range(4):
            others = (state.square().sum(-1, keepdim=True) / (2 * h)).clamp(max=8.0)
            missing = level + others - (own @ noise[..., None])[..., 0]
            state = noise + (own.mT @ torch.linalg.solve(gram, missing[..., None]))[..., 0]
        hidden[rows] = state

    # A draw from the row: one of its peaks, or anything.
    drawn = torch.multinomial(torch.cat((p, rest[:, None]), 1), 1, generator=generator)[:, 0]
    anything = torch.randint(v, (n,), generator=generator, device=device)
    peak = entries.gather(1, drawn.clamp(max=peaks - 1)[:, None])[:, 0]
    ids = torch.where(drawn < peaks, peak, anything)
    return LossInputs.of_rows(hidden.to(dtype), weight, ids, shape.sequences, generator)


def _peak_probabilities(mass: Tensor, peaks: int) -> Tensor:
    """Return (rows, peaks): the mass between two ranks spread evenly over what is between them."""
    probabilities = torch.zeros(len(mass), peaks, dtype=mass.dtype)
    before, start = torch.zeros(len(mass), dtype=mass.dtype), 0
    for rank, upto in zip(RANKS, mass.T, strict=True):
        stop = min(rank, peaks)
        if stop > start:
            probabilities[:, start:stop] = ((upto - before) / (rank - start))[:, None]
        before, start = upto, rank
    return probabilities
