"""Five estimators of a gradient that backpropagation cannot give, with equally many sentences.

  python examples/estimators.py --output-dir out      # 12 CPU minutes; --quick: less than one

A small recurrent network writes sentences letter by letter, and each should be ten letters long:
the loss (10 - |y|)^2 counts letters and has no gradient. Every method gets the same network,
optimizer (Adam), number of sentences and search for its learning rate. The search tries each value
of a grid on seeds of its own and takes the one with the lowest loss over the last fifth of the run;
the figure shows other seeds. REINFORCE over parameters has a second setting, sigma, which is
searched too. ``--output-dir`` receives estimators.png and estimators.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm import tqdm

import fastgrpo
from fastgrpo.train.evolution import shape_by_rank

LETTERS, END, TARGET, LONGEST, HIDDEN = 27, 27, 10, 30, 32  # END is the token after the letters
PROMPTS, GROUP = 8, 8  # a sentence's first letter is its prompt; GROUP sentences share one
BATCH = PROMPTS * GROUP


@dataclass(frozen=True)
class Settings:
    """How long and how often everything runs."""

    sentences: int = 10_240
    seeds: int = 5
    tuning_seeds: int = 2
    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    sigmas: tuple[float, ...] = (0.1, 0.3, 1.0)
    evaluations: int = 32
    evaluated: int = 256  # sentences per evaluation; these are not counted as learned from


QUICK = Settings(
    sentences=512,
    seeds=2,
    tuning_seeds=1,
    learning_rates=(0.01, 0.03),
    sigmas=(0.1,),
    evaluations=4,
)


class Writer(nn.Module):
    """An Elman network over letters: 2 848 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(LETTERS + 1, HIDDEN)
        self.memory = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, LETTERS + 1, bias=False)

    def forward(self, token: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next state and the logits of the next token."""
        state = self.advance(token, state)
        return state, self.head(state)

    def advance(self, token: Tensor, state: Tensor) -> Tensor:
        """Return the state after ``token``."""
        return torch.tanh(self.letters(token) + self.memory(state))


@torch.no_grad()
def write(step: Callable, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Return sampled letters (B, T) and a mask (B, T) through the end token; ``step`` as Writer."""
    token, state = prompts, torch.zeros(len(prompts), HIDDEN)
    alive, ids, mask = torch.ones(len(prompts), dtype=torch.bool), [], []
    while alive.any() and len(ids) < LONGEST:
        state, logits = step(token, state)
        token = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        ids.append(token)
        mask.append(alive)
        alive = alive & (token != END)
    return torch.stack(ids, 1), torch.stack(mask, 1)


def losses(ids: Tensor, mask: Tensor) -> Tensor:
    """Return (10 - |y|)^2 of each sentence, (B,) fp32; |y| is its number of letters."""
    return (TARGET - (mask & (ids != END)).sum(1).float()).square()


def read(model: Writer, prompts: Tensor, ids: Tensor) -> Tensor:
    """Return the states (B, T, H) that predict each letter, with gradient."""
    state, states = torch.zeros(len(ids), HIDDEN), []
    for token in [prompts, *ids[:, :-1].T]:
        state = model.advance(token, state)
        states.append(state)
    return torch.stack(states, 1)


def over_parameters(model: Writer, optimizer: torch.optim.Optimizer, sigma: float) -> None:
    """E[l(f_theta) (theta - mu)] / sigma^2, theta ~ N(mu, sigma^2): each sentence has its model."""
    mu = dict(model.named_parameters())
    half = {k: torch.randn(BATCH // 2, *p.shape) for k, p in mu.items()}
    noise = {k: torch.cat((e, -e)) for k, e in half.items()}
    theta = {k: p.detach() + sigma * noise[k] for k, p in mu.items()}
    prompts = torch.randint(PROMPTS, (BATCH // 2,)).repeat(2)
    step = vmap(lambda p, token, state: functional_call(model, p, (token, state)))
    ids, mask = write(lambda token, state: step(theta, token, state), prompts)
    shaped = shape_by_rank(losses(ids, mask))
    for k, p in mu.items():
        p.grad = torch.tensordot(shaped, noise[k], 1) / (BATCH * sigma)
    optimizer.step()


def over_tokens(
    model: Writer,
    optimizer: torch.optim.Optimizer,
    advantages: Callable[[Tensor], Tensor],
    loss: fastgrpo.LossConfig,
    epochs: int = 1,
) -> None:
    """E[A(y) grad ln pi(y|x)], with importance sampling from the second epoch on."""
    prompts = torch.randint(PROMPTS, (PROMPTS,)).repeat_interleave(GROUP)
    ids, mask = write(model, prompts)
    weights = advantages(-losses(ids, mask) / TARGET**2)
    # A mean over sentences of sums over letters is the policy gradient itself; the preset "grpo"
    # has its own mean, over the letters of each sentence.
    normalizer = BATCH if loss.aggregation == "token_mean" else None
    old_logps = None
    for _ in range(epochs):
        optimizer.zero_grad()
        out = fastgrpo.grpo_loss(
            read(model, prompts, ids),
            model.head.weight,
            ids,
            mask,
            weights,
            old_logps=old_logps,
            normalizer=normalizer,
            config=loss,
        )
        out.loss.backward()
        optimizer.step()
        old_logps = out.logps if old_logps is None else old_logps


def against_the_others(rewards: Tensor) -> Tensor:
    """Return each reward minus the mean of all others, which it cannot have influenced."""
    return (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)


REINFORCE, PPO, GRPO = map(fastgrpo.LossConfig.preset, ("reinforce", "bnpo", "grpo"))
METHODS: dict[str, Callable[[Writer, torch.optim.Optimizer, float], None]] = {
    "REINFORCE over parameters": over_parameters,
    "REINFORCE over tokens": lambda m, o, _: over_tokens(m, o, lambda r: r, REINFORCE),
    "with a baseline": lambda m, o, _: over_tokens(m, o, against_the_others, REINFORCE),
    "PPO, 4 epochs": lambda m, o, _: over_tokens(
        m, o, lambda r: fastgrpo.group_advantages(r, BATCH), PPO, epochs=4
    ),
    "GRPO, 4 epochs": lambda m, o, _: over_tokens(
        m, o, lambda r: fastgrpo.group_advantages(r, GROUP), GRPO, epochs=4
    ),
}


def learn(method: str, rate: float, sigma: float, seed: int, settings: Settings) -> list[float]:
    """Return the mean loss of fresh sentences, at the start and at regular intervals."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Writer()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    updates = settings.sentences // BATCH
    every = max(1, updates // settings.evaluations)
    curve = []
    for update in range(updates + 1):
        if update % every == 0:
            prompts = torch.arange(PROMPTS).repeat(settings.evaluated // PROMPTS)
            curve.append(losses(*write(model, prompts)).mean().item())
        if update < updates:
            METHODS[method](model, optimizer, sigma)
    return curve


def final(curve: list[float]) -> float:
    """Return the mean over the last fifth of a curve."""
    return statistics.fmean(curve[-max(1, len(curve) // 5) :])


def run_all(jobs: list[tuple], settings: Settings, title: str) -> list[list[float]]:
    """Return the curve of each (method, rate, sigma, seed), with one process per core."""
    curves: list[list[float]] = [[]] * len(jobs)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(learn, *job, settings): i for i, job in enumerate(jobs)}
        for future in tqdm(as_completed(futures), total=len(jobs), desc=title):
            curves[futures[future]] = future.result()
    return curves


def tune(settings: Settings) -> dict[str, dict]:
    """Return each method's best learning rate (and sigma) by final loss, and all that was tried."""
    jobs = []
    for method in METHODS:
        sigmas = settings.sigmas if METHODS[method] is over_parameters else (math.nan,)
        seeds = range(1000, 1000 + settings.tuning_seeds)
        jobs += product([method], settings.learning_rates, sigmas, seeds)
    tried: dict[str, dict[tuple, list[float]]] = {}
    for (method, rate, sigma, _), curve in zip(
        jobs, run_all(jobs, settings, "tuning"), strict=True
    ):
        key = (rate, None if math.isnan(sigma) else sigma)
        tried.setdefault(method, {}).setdefault(key, []).append(final(curve))
    chosen = {}
    for method, results in tried.items():
        means = {key: statistics.fmean(values) for key, values in results.items()}
        (rate, sigma), _ = min(means.items(), key=lambda item: item[1])
        chosen[method] = {
            "learning_rate": rate,
            "sigma": sigma,
            "tried": [
                {"learning_rate": r, "sigma": s, "final_loss": loss}
                for (r, s), loss in means.items()
            ],
        }
    return chosen


def compare(settings: Settings) -> dict:
    """Tune, run every method on every seed, and return the record that becomes the JSON file."""
    chosen = tune(settings)
    jobs = [
        (method, chosen[method]["learning_rate"], chosen[method]["sigma"], seed)
        for method in METHODS
        for seed in range(settings.seeds)
    ]
    curves = run_all(jobs, settings, "runs")
    for method, record in chosen.items():
        record["losses"] = [c for (m, *_), c in zip(jobs, curves, strict=True) if m == method]
    points = len(curves[0])
    return {
        "settings": asdict(settings),
        "sentences": [round(i * settings.sentences / (points - 1)) for i in range(points)],
        "methods": chosen,
    }


def spread(record: dict, i: int) -> tuple[float, float, float]:
    """Return mean, lowest and highest loss over the seeds at evaluation ``i``."""
    values = [curve[i] for curve in record["losses"]]
    return statistics.fmean(values), min(values), max(values)


def table(result: dict) -> str:
    """Return the final losses, and the sentences until the mean loss was first below 10."""
    lines = ["method | learning rate | sigma | final loss: mean (seeds) | sentences to loss < 10"]
    for method, record in result["methods"].items():
        ends = sorted(final(curve) for curve in record["losses"])
        means = [spread(record, i)[0] for i in range(len(result["sentences"]))]
        reached = [n for n, mean in zip(result["sentences"], means, strict=True) if mean < TARGET]
        lines.append(
            f"{method} | {record['learning_rate']:g} | {record['sigma'] or '-'} | "
            f"{statistics.fmean(ends):.2f} ({ends[0]:.2f}-{ends[-1]:.2f}) | "
            f"{reached[0] if reached else 'not reached'}"
        )
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Draw the reward of fresh sentences against the sentences learned from."""
    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for method, record in result["methods"].items():
        band = [spread(record, i) for i in range(len(result["sentences"]))]
        mean, low, high = ([-x for x in column] for column in zip(*band, strict=True))
        (line,) = axes.plot(result["sentences"], mean, label=method)
        axes.fill_between(result["sentences"], low, high, color=line.get_color(), alpha=0.15)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([0, -1, -10, -100], ["0", "-1", "-10", "-100"])
    axes.set_xlabel("sentences written to learn from")
    axes.set_ylabel("mean reward, -(10 - letters)² (0 is best)")
    seeds = len(next(iter(result["methods"].values()))["losses"])
    axes.set_title(f"Sentences should be ten letters long: mean and range of {seeds} seeds")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Compare, then print the table and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="Folder for both files.")
    parser.add_argument("--quick", action="store_true", help="A run for tests, no result.")
    options = parser.parse_args(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    result = compare(QUICK if options.quick else Settings())
    text = json.dumps(result, indent=1) + "\n"
    (options.output_dir / "estimators.json").write_text(text, encoding="utf-8")
    plot(result, options.output_dir / "estimators.png")
    print(table(result))


if __name__ == "__main__":
    main()
