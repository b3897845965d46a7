"""Does REINFORCE over parameters survive 70M or 175B of them? Variance and progress, measured.

  python examples/dimension.py --output-dir out       # about two minutes; --quick: seconds

The writer ends its sentence after letter t with probability sigmoid(u_t), t < 20, and should write
ten letters: the loss is (10 - |y|)^2. Sentences differ only in their length, so expected loss,
gradient and Hessian are known exactly. The number of parameters d grows in two ways:

  fixed intrinsic dimension: each u_t is the sum of d / 20 weights over sqrt(d / 20). However large
  d is, only 20 directions matter, as when fine-tuning moves a large network in a few directions.

  growing intrinsic dimension: d / 20 prompts, each with 20 weights of its own. Every weight counts.

Both estimators get two sentences for each prompt, and use the difference of the two losses:

  over parameters  (l(y+) - l(y-)) / (2 sigma) e       y+-  written by mu +- sigma e, e ~ N(0, 1)
  over tokens      (l(y1) - l(y2)) (s1 - s2) / 2       s = grad ln pi(y), y1 and y2 written by mu

Two numbers are measured for each. The relative variance is E|g_hat - g|^2 / |g|^2. The progress is
the expected decrease of the loss in one step of the best length, as a share of the decrease with
the exact gradient. ``--output-dir`` receives dimension.png and dimension.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import logsigmoid, pad
from tqdm import tqdm

POSITIONS, TARGET, ENDING, SIGMA = 20, 10, 0.2, 0.5  # ENDING: sigmoid(u_t) at the start
DECADES, QUICK_DECADES = 6, 3  # d = 20, 200, ...
NUMBERS, QUICK_NUMBERS = 4e8, 2e6  # weights drawn at each d, over all estimates
MOST_ESTIMATES, QUICK_ESTIMATES = 4096, 1024
PROMPTS_BENT = 8  # prompts on which the nonlinear part of a step's decrease is measured
STEPS = torch.logspace(-5, 1, 61, dtype=torch.float64)  # lengths tried, as multiples of g_hat
BOOTSTRAPS = 1000
THEORY_DRAWS = 2**19
SCALING = {"fixed": "fixed intrinsic dimension", "growing": "growing intrinsic dimension"}
EXTRAPOLATED = {"70M": 70e6, "175B": 175e9}

CONSEQUENCES = """\
What follows for 70M and 175B parameters. EXTRAPOLATION, by the theory above, from a toy and far
beyond the d = {measured:.0e} that was measured:

The noise of an estimate from two sentences grows with d. Over parameters, its relative variance is
{noise_small:.1e} at 70M and {noise_large:.1e} at 175B; over tokens it is {noise_tokens:.1f} at
both. That many estimates must be averaged until noise and gradient are equally large. But most of
the noise is in directions in which the loss does not change. If only 20 directions matter, the best
step makes {progress_fixed:.4f} of the exact gradient's progress at any d, against
{progress_tokens:.2f} over tokens. If every parameter matters, it makes {progress_small:.0e} at 70M
and {progress_large:.0e} at 175B. So the cost of REINFORCE over parameters grows with the number of
directions that matter, not with the number of parameters. It can work where few matter, as in
fine-tuning, and is hopeless where all do.

Work that agrees: fine-tuning of up to 66B parameters, with an effective rank in place of d (Malladi
et al. 2023, arXiv 2305.17333); evolution of billions of parameters (Qiu et al. 2025,
arXiv 2509.24372; EGGROLL, arXiv 2511.16652); 90 % of fine-tuning on MRPC from 200 random directions
(Aghajanyan et al. 2020, arXiv 2012.13255); the intrinsic dimension counts (Salimans et al. 2017,
arXiv 1703.03864). Work with a stricter result: bounds with a factor d for the worst case, which is
the growing one here (Nesterov and Spokoiny 2017, Found. Comput. Math. 17, 527; Vemula et al. 2019,
arXiv 1901.11503). Vemula et al. add that exploring over tokens costs more the more tokens there
are; here there are at most 20."""

LOSSES = (TARGET - torch.arange(POSITIONS + 1.0)).square()  # by the number of letters
START = torch.full((POSITIONS,), math.log(ENDING / (1 - ENDING)))


def expected_loss(u: Tensor) -> Tensor:
    """Return E[(10 - |y|)^2] for logits u (..., 20), exactly: a sum over the 21 lengths."""
    going = pad(logsigmoid(-u).cumsum(-1), (1, 0))
    return ((going + pad(logsigmoid(u), (0, 1))).exp() * LOSSES.to(u)).sum(-1)


GRADIENT = torch.func.grad(expected_loss)(START)  # of one prompt's loss, (20,)
HESSIAN = torch.func.hessian(expected_loss)(START)


def write(u: Tensor, draw: torch.Generator) -> Tensor:
    """Return the number of letters (...) of a sentence sampled for each row of u (..., 20)."""
    ends = torch.rand(u.shape, generator=draw) < u.sigmoid()
    return torch.where(ends.any(-1), ends.float().argmax(-1), POSITIONS)


def score_function(letters: Tensor) -> Tensor:
    """Return grad_u ln pi(y) (..., 20) at the start for sentences of so many letters (...)."""
    t = torch.arange(POSITIONS)
    letters = letters[..., None]
    return (t == letters).float() - ENDING * (t <= letters)


class Estimates(NamedTuple):
    """n estimates at one d: the numbers from which variance and progress are computed."""

    squares: Tensor  # (n,) |g_hat|^2
    along: Tensor  # (n,) g_hat . g
    moves: Tensor  # (n, prompts, 20): the change of some prompts' logits along g_hat
    gradient_square: float  # |g|^2


def estimate(method: str, prompts: int, width: int, n: int, draw: torch.Generator) -> Estimates:
    """Return n estimates for a writer of prompts * 20 * width weights.

    The loss is the mean over prompts. A logit is the sum of its ``width`` weights over sqrt(width),
    so the gradients with respect to logits and to weights have the same length.
    """
    squares, along, moves = torch.empty(n), torch.empty(n), []
    for i in range(n):
        if method == "parameters":
            noise = torch.randn(prompts, POSITIONS, width, generator=draw)
            seen = noise.sum(-1) / math.sqrt(width)
            lost = [LOSSES[write(START + sign * SIGMA * seen, draw)].mean() for sign in (1, -1)]
            scale = (lost[0] - lost[1]) / (2 * SIGMA)
            squares[i], move = noise.square().sum() * scale**2, seen * scale
        else:
            first, second = (write(START.expand(prompts, -1), draw) for _ in range(2))
            weight = (LOSSES[first] - LOSSES[second]) / (2 * prompts)
            move = weight[:, None] * (score_function(first) - score_function(second))
            in_weights = (move / math.sqrt(width))[..., None].expand(-1, -1, width)
            squares[i] = in_weights.square().sum()
        along[i] = (move @ GRADIENT).sum() / prompts
        moves.append(move[:PROMPTS_BENT].clone())
    return Estimates(squares, along, torch.stack(moves), GRADIENT.square().sum().item() / prompts)


def variances(e: Estimates) -> Tensor:
    """Return |g_hat - g|^2 / |g|^2 of each estimate, (n,): their mean is the relative variance."""
    return (e.squares - 2 * e.along) / e.gradient_square + 1


def falls(e: Estimates, steps: Tensor) -> Tensor:
    """Return how much each step along each estimate decreases the mean loss, (n, steps) fp64."""
    moves, start, gradient = e.moves.double(), START.double(), GRADIENT.double()
    result = torch.empty(len(moves), len(steps), dtype=torch.float64)
    for j, step in enumerate(steps):
        bent = expected_loss(start - step * moves) - expected_loss(start) + step * moves @ gradient
        result[:, j] = step * e.along - bent.mean(1)
    return result


def exact_fall() -> float:
    """Return how much the best step along the exact gradient decreases the loss."""
    steps = START - STEPS[:, None] * GRADIENT
    return (expected_loss(START.double()) - expected_loss(steps)).max().item()


def best_fall(fall: Tensor) -> Tensor:
    """Return the decrease (n,) of each estimate at the best step, as a share of `exact_fall`.

    The step is chosen on one half of the estimates and measured on the other: choosing and
    measuring on the same estimates would be biased upwards.
    """
    chosen = torch.empty(len(fall), dtype=fall.dtype)
    halves = slice(0, None, 2), slice(1, None, 2)
    for mine, others in (halves, halves[::-1]):
        chosen[mine] = fall[mine, fall[others].mean(0).argmax()]
    return chosen / exact_fall()


def parameter_theory() -> Callable[[str, float], tuple[float, float]]:
    """Return (kind, d) -> relative variance and progress over parameters.

    Let D be the difference of the losses of one prompt. For any d, only the noise in that prompt's
    20 logits is correlated with D; D^2 multiplies all other noise. So everything follows from four
    means. The progress is that of a quadratic loss, (E g_hat . g)^2 / (2 E g_hat' H g_hat).
    """
    draw = torch.Generator().manual_seed(-1)
    noise = torch.randn(THEORY_DRAWS, POSITIONS, generator=draw)
    lost = [LOSSES[write(START + sign * SIGMA * noise, draw)] for sign in (1, -1)]
    difference = (lost[0] - lost[1]) / (2 * SIGMA)
    square = difference.square().mean().item()
    own = (difference.square() * noise.square().sum(1)).mean().item()
    curved = (difference.square() * ((noise @ HESSIAN) * noise).sum(1)).mean().item()
    along = (difference * (noise @ GRADIENT)).mean().item()
    gradient = GRADIENT.square().sum().item()

    def predict(kind: str, d: float) -> tuple[float, float]:
        variance = (own + (d - POSITIONS) * square - 2 * along) / gradient + 1
        others = (d / POSITIONS - 1) * square * HESSIAN.trace().item() if kind == "growing" else 0
        return variance, along**2 / (2 * (curved + others)) / exact_fall()

    return predict


def token_theory() -> tuple[float, float]:
    """Return relative variance and progress over tokens, the same for every d.

    Exact, by enumeration: 21 lengths of one sentence times 21 of the other.
    """
    lengths = torch.arange(POSITIONS + 1)
    scores = score_function(lengths)
    chance = (pad(logsigmoid(-START).cumsum(-1), (1, 0)) + pad(logsigmoid(START), (0, 1))).exp()
    both = chance[:, None] * chance
    estimates = (LOSSES[:, None] - LOSSES)[..., None] * (scores[:, None] - scores) / 2
    gradient = GRADIENT.square().sum().item()
    variance = (both * estimates.square().sum(-1)).sum().item() / gradient - 1
    stepped = expected_loss(START - STEPS[:, None, None, None] * estimates)
    fall = (both * (expected_loss(START) - stepped)).sum((1, 2)).max().item()
    return variance, fall / exact_fall()


def exponent(dimensions: list[int], samples: list[Tensor], draw: torch.Generator) -> dict:
    """Return the slope of ln(mean) over ln(d) by weighted least squares, with its interval."""
    x = torch.tensor(dimensions).double().log()
    # Weights: the inverse variance of ln(mean), which is the relative variance of the mean.
    weight = torch.stack([len(s) * (s.mean() / s.std()).square() for s in samples]).double()

    def slope(means: Tensor) -> Tensor:
        y, centre = means.log(), (weight * x).sum() / weight.sum()
        return (weight * (x - centre) * y).sum() / (weight * (x - centre).square()).sum()

    drawn = torch.empty(BOOTSTRAPS, dtype=torch.float64)
    for i in range(BOOTSTRAPS):
        picked = [s[torch.randint(len(s), s.shape, generator=draw)].mean() for s in samples]
        drawn[i] = slope(torch.stack(picked).double())
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    means = torch.stack([s.mean() for s in samples]).double()
    return {"exponent": slope(means).item(), "interval_95": [low, high]}


def measure(quick: bool) -> dict:
    """Return the record that becomes the JSON file."""
    decades, numbers, most = (
        (QUICK_DECADES, QUICK_NUMBERS, QUICK_ESTIMATES)
        if quick
        else (DECADES, NUMBERS, MOST_ESTIMATES)
    )
    dimensions = [POSITIONS * 10**k for k in range(decades)]
    predict, over_tokens = parameter_theory(), token_theory()
    curves, draw = [], torch.Generator().manual_seed(0)
    bar = tqdm(total=4 * decades, desc="dimension")
    for kind in SCALING:
        for method in ("parameters", "tokens"):
            samples: dict[str, list[Tensor]] = {"variance": [], "progress": []}
            for d in dimensions:
                n = 2 * int(min(most, numbers / d) / 2)
                prompts, width = (1, d // POSITIONS) if kind == "fixed" else (d // POSITIONS, 1)
                estimates = estimate(method, prompts, width, n, draw)
                samples["variance"].append(variances(estimates))
                if method == "parameters":
                    fall = falls(estimates, STEPS)
                else:
                    # Over tokens each prompt has its own estimate, of 1 / prompts of its gradient,
                    # so some prompts can stand for all. Over parameters all prompts share one
                    # difference of losses.
                    own = estimates._replace(along=(estimates.moves @ GRADIENT).mean(1))
                    fall = falls(own, STEPS * prompts)
                samples["progress"].append(best_fall(fall))
                bar.update()
            theory = [
                predict(kind, d) if method == "parameters" else over_tokens for d in dimensions
            ]
            for i, (quantity, values) in enumerate(samples.items()):
                curves.append(
                    {
                        "scaling": kind,
                        "method": method,
                        "quantity": quantity,
                        "mean": [v.mean().item() for v in values],
                        "standard_error": [(v.std() / len(v) ** 0.5).item() for v in values],
                        "theory": [pair[i] for pair in theory],
                        **exponent(dimensions, values, draw),
                    }
                )
    bar.close()
    return {
        "dimensions": dimensions,
        "sigma": SIGMA,
        "curves": curves,
        "extrapolation": [
            {
                "parameters": name,
                "over_tokens": dict(zip(("variance", "progress"), over_tokens, strict=True)),
                **{
                    k: dict(zip(("variance", "progress"), predict(k, d), strict=True))
                    for k in SCALING
                },
            }
            for name, d in EXTRAPOLATED.items()
        ],
    }


def find(result: dict, **wanted: str) -> dict:
    """Return the curve with these entries."""
    return next(c for c in result["curves"] if wanted.items() <= c.items())


def answer(result: dict) -> str:
    """Return the table of exponents and what follows for large models, as text."""
    lines = ["exponent of d: measured [95 % interval], theory over the same d"]
    x = torch.tensor(result["dimensions"]).double().log()
    for curve in result["curves"]:
        y = torch.tensor(curve["theory"]).double().log()
        theory = (((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()).item()
        low, high = curve["interval_95"]
        lines.append(
            f"  {curve['quantity']}, {SCALING[curve['scaling']]}, over {curve['method']}: "
            f"{curve['exponent']:.3f} [{low:.3f}, {high:.3f}], {theory:.3f}"
        )
    small, large = result["extrapolation"]
    text = CONSEQUENCES.format(
        measured=result["dimensions"][-1],
        noise_small=small["fixed"]["variance"],
        noise_large=large["fixed"]["variance"],
        noise_tokens=small["over_tokens"]["variance"],
        progress_fixed=small["fixed"]["progress"],
        progress_tokens=small["over_tokens"]["progress"],
        progress_small=small["growing"]["progress"],
        progress_large=large["growing"]["progress"],
    )
    return "\n".join([*lines, "", text])


def plot(result: dict, path: Path) -> None:
    """Draw variance and progress over d, in the two ways that d grows."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    labels = {
        "variance": "relative variance of the estimate\nE|ĝ - g|² / |g|²",
        "progress": "progress of the best step\n(share of the exact gradient's)",
    }
    for row, quantity in zip(axes, labels, strict=True):
        row[0].set_ylabel(labels[quantity])
        for cell, kind in zip(row, SCALING, strict=True):
            for method, color in (("parameters", "C0"), ("tokens", "C1")):
                curve = find(result, scaling=kind, method=method, quantity=quantity)
                low, high = curve["interval_95"]
                cell.errorbar(
                    result["dimensions"],
                    curve["mean"],
                    [1.96 * e for e in curve["standard_error"]],
                    fmt="o",
                    color=color,
                    capsize=3,
                    label=f"over {method}: d^{curve['exponent']:.2f} [{low:.2f}, {high:.2f}]",
                )
                cell.plot(result["dimensions"], curve["theory"], color=color)
            cell.set_xscale("log")
            cell.set_yscale("log")
            cell.grid(alpha=0.3)
            cell.legend(fontsize=8)
            if quantity == "variance":
                cell.set_title(SCALING[kind])
            else:
                cell.set_xlabel("number of parameters d")
    figure.suptitle(
        "Two sentences per prompt and estimate. Points: measured, 95 % intervals; lines: theory",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Measure, then write the files and print the answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="Folder for both files.")
    parser.add_argument("--quick", action="store_true", help="A run for tests: seconds, no result.")
    options = parser.parse_args(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    result = measure(options.quick)
    text = json.dumps(result, indent=1) + "\n"
    (options.output_dir / "dimension.json").write_text(text, encoding="utf-8")
    plot(result, options.output_dir / "dimension.png")
    print(answer(result))


if __name__ == "__main__":
    main()
