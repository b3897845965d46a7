"""REINFORCE over parameters: learn from scores alone, without a backward.

The search distribution is N(mu, sigma^2) and mu is the model's own weights. With theta = mu +
sigma * e, the log-derivative trick gives the gradient of the expected score J:

    dJ/dmu = E[score(theta) * d ln p(theta; mu) / dmu] = E[score(mu + sigma * e) * e] / sigma

(Williams 1992; as a large-scale method Salimans et al. 2017, arXiv 1703.03864). Noise is never
stored. It is drawn again from its seed wherever it is needed, so processes exchange nothing but
scores.

A candidate is perturbed in place, one module at a time. When a module is called, noise is added to
its weights; when it returns, the weights are restored from a copy. Subtracting the noise would not
restore them: floating-point addition rounds, and mu + e has no room for the low bits of a small mu.
The memory beside the model is a copy of the running module's own weights and a slice of noise. The
price is one draw per weight and forward: every generated token draws the noise again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import fastgrpo

# Numbers of noise held at a time: 4 MiB in fp32.
SLICE = 2**20


class Candidate(NamedTuple):
    """The model at mu + sign * sigma * noise(seed)."""

    seed: int
    sign: int  # 1 or -1: the two of an antithetic pair


def check_search(sigma: float, learning_rate: float, num_pairs: int, shaping: str) -> None:
    """Raise ValueError for settings that `Evolution` cannot have."""
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma: expected a positive number, got {sigma}")
    if not 0 <= learning_rate < float("inf"):
        raise ValueError(f"learning_rate: expected a number >= 0, got {learning_rate}")
    if num_pairs < 1:
        raise ValueError(f"num_pairs: expected at least 1, got {num_pairs}")
    if shaping not in SHAPINGS:
        raise ValueError(f"shaping: expected one of {sorted(SHAPINGS)}, got {shaping!r}")


class Evolution:
    """Gradient ascent on the expected score, from the scores of perturbed models.

        search = Evolution(model, sigma=0.02, learning_rate=0.02, num_pairs=16)
        scores = []
        for candidate in search.candidates():
            with search.perturbed(candidate):
                scores.append(evaluate(model))
        search.update(torch.tensor(scores))

    Several processes can share the work. They start from the same weights, each scores a share of
    ``candidates()``, they exchange the scores, and all call ``update`` with all scores. Their
    weights then stay equal bit for bit, if they run the same torch on the same kind of device.

    Args:
        model: the search is over its parameters that require a gradient: fp32 or bf16, contiguous.
            No gradient is computed. Each of them must be used in calls of the module that owns it.
        sigma: standard deviation of the noise on every weight, in units of the weights.
        learning_rate: mu moves by this times the gradient estimate
            sum_i shaped_i * sign_i * noise_i / (2 * num_pairs * sigma).
        num_pairs: antithetic pairs, mu + e and mu - e, per update.
        shaping: how scores are transformed before they are averaged. "ranks": evenly spaced from
            -1/2 for the worst to 1/2 for the best; equal scores get the middle of their ranks.
            "zscore": (score - mean) / standard deviation, which is GRPO's advantage with the
            population as the group.
        seed: of all random numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma: float,
        learning_rate: float,
        num_pairs: int,
        shaping: Literal["ranks", "zscore"] = "ranks",
        seed: int = 0,
    ) -> None:
        check_search(sigma, learning_rate, num_pairs, shaping)
        for name, parameter in searched(model).items():
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(
                    f"model: expected fp32 or bf16 parameters, got {parameter.dtype} in {name}"
                )
        self.model, self.sigma, self.learning_rate = model, sigma, learning_rate
        self.num_pairs, self.shaping, self.seed = num_pairs, shaping, seed
        self.step = 0

    def candidates(self) -> list[Candidate]:
        """Return this step's 2 * num_pairs candidates; those of a pair are adjacent."""
        rng = random.Random(f"{self.seed}/{self.step}")
        seeds = [rng.getrandbits(62) for _ in range(self.num_pairs)]
        return [Candidate(seed, sign) for seed in seeds for sign in (1, -1)]

    @contextmanager
    def perturbed(self, candidate: Candidate) -> Iterator[None]:
        """Within this context the model computes as ``candidate``; see `perturbed`."""
        with perturbed(self.model, candidate.seed, candidate.sign * self.sigma):
            yield

    def update(self, scores: Tensor) -> None:
        """Move mu by this step's scores and go on to the next step.

        Args:
            scores: (2 * num_pairs,) fp32 in the order of ``candidates()``, more is better. NaN
                marks a candidate without a score: it counts as an average one.
        """
        candidates = self.candidates()
        if tuple(scores.shape) != (len(candidates),):
            raise ValueError(
                f"scores: expected shape {(len(candidates),)}, got {tuple(scores.shape)}"
            )
        shaped = SHAPINGS[self.shaping](scores.float()).view(-1, 2)
        rate = self.learning_rate / (len(candidates) * self.sigma)
        weights = (rate * (shaped[:, 0] - shaped[:, 1])).tolist()
        add_noises(self.model, [c.seed for c in candidates[::2]], weights)
        self.step += 1


@contextmanager
def perturbed(model: nn.Module, seed: int, scale: float) -> Iterator[None]:
    """Within this context ``model`` computes with weights + scale * noise(seed).

    Outside the calls of its modules, and however the context is left, the weights are unchanged bit
    for bit. A bf16 weight is perturbed in fp32 and rounded.

    Raises:
        ValueError: if a searched parameter was used by no call of the module that owns it: it was
            read from outside that module, or not at all, and therefore had no noise.
    """
    parameters = searched(model)
    places = {id(parameter): i for i, parameter in enumerate(parameters.values())}
    used: set[int] = set()
    calls: list[list[tuple[Tensor, Tensor]]] = []  # per running module: weights and their copies

    @torch.no_grad()
    def perturb(module: nn.Module, _: object) -> None:
        running = {id(weight) for call in calls for weight, _ in call}
        own = [p for p in module.parameters(recurse=False) if id(p) in places.keys() - running]
        calls.append([(parameter, parameter.clone()) for parameter in own])
        for parameter in own:
            used.add(id(parameter))
            draw = generator(seed, places[id(parameter)], parameter.device)
            for part in parameter.view(-1).split(SLICE):
                part.copy_(noise_like(part, draw).mul_(scale).add_(part))

    @torch.no_grad()
    def restore(*_: object) -> None:
        for weight, bits in calls.pop():
            weight.copy_(bits)

    owners = [module for module in model.modules() if any(True for _ in module.parameters(False))]
    hooks = [module.register_forward_pre_hook(perturb) for module in owners]
    hooks += [module.register_forward_hook(restore, always_call=True) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while calls:  # after a KeyboardInterrupt, which skips the hooks
            restore()
    missed = [name for name, parameter in parameters.items() if id(parameter) not in used]
    if missed:
        raise ValueError(
            f"model: expected every searched parameter to be used by a call of its own module, got "
            f"none for {', '.join(missed)}; parameters without requires_grad are left alone"
        )


@torch.no_grad()
def add_noises(model: nn.Module, seeds: list[int], weights: list[float]) -> None:
    """Add sum_i weights[i] * noise(seeds[i]) to the model's searched parameters, in place.

    A bf16 weight is rounded stochastically, so that its mean is exact. Rounding to nearest would
    lose every update smaller than half of the weight's last bit.
    """
    chosen = [(seed, weight) for seed, weight in zip(seeds, weights, strict=True) if weight]
    if not chosen:
        return
    for place, parameter in enumerate(searched(model).values()):
        draws = [generator(seed, place, parameter.device) for seed, _ in chosen]
        odds = generator(chosen[0][0], -1 - place, parameter.device)
        for part in parameter.view(-1).split(SLICE):
            moved = part.float()
            for draw, (_, weight) in zip(draws, chosen, strict=True):
                moved = noise_like(part, draw).mul_(weight).add_(moved)
            part.copy_(moved if part.dtype == torch.float32 else round_at_random(moved, odds))


def searched(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name; tied parameters appear once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def generator(seed: int, place: int, device: torch.device) -> torch.Generator:
    """Return the random generator for the noise of one parameter under one seed."""
    # The seed is hashed: neighbouring seeds of a generator may give related streams.
    mixed = random.Random(f"{seed}/{place}").getrandbits(62)
    return torch.Generator(device).manual_seed(mixed)


def noise_like(part: Tensor, draw: torch.Generator) -> Tensor:
    """Return standard normal noise in the shape of ``part``, fp32."""
    return torch.empty(part.shape, device=part.device).normal_(generator=draw)


def round_at_random(x: Tensor, draw: torch.Generator) -> Tensor:
    """Return fp32 ``x`` in bf16, rounded stochastically: the mean of the result is x."""
    # bf16 is the upper half of fp32. Adding random bits to the lower half carries into the upper
    # half with exactly the right probability.
    lower = torch.randint(2**16, x.shape, generator=draw, device=x.device, dtype=torch.int32)
    return (x.view(torch.int32) + lower & -(2**16)).view(torch.float32).bfloat16()


def shape_by_rank(scores: Tensor) -> Tensor:
    """Return evenly spaced numbers from -1/2 (worst) to 1/2 (best), (n,) fp32; NaN becomes 0."""
    above = (scores[:, None] > scores).sum(1)
    below = (scores[:, None] < scores).sum(1)
    return (above - below) / (2 * max(1, len(scores) - 1))


def shape_by_zscore(scores: Tensor) -> Tensor:
    """Return (score - mean) / std, over the scores that are not NaN, (n,) fp32; NaN becomes 0."""
    return fastgrpo.group_advantages(scores, len(scores))


SHAPINGS = {"ranks": shape_by_rank, "zscore": shape_by_zscore}
