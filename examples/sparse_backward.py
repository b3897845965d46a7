"""Does a policy learn the same from the unbiased sparse backward as from the exact one?

  python examples/sparse_backward.py --output-dir out    # 20 CPU minutes; --quick: seconds

A softmax policy over 32,768 tokens must name the right token for each of 1,024 prompts. It starts
half-trained, from cross-entropy, and goes on with GRPO: 32 prompts per step, 8 answers each,
reward 1 for the right token. Runs differ in `sparsity` alone: starts, prompts and seeds are the
same. The spread over seeds shows how much equivalent runs differ. ``--output-dir`` receives
sparse-learning.png and sparse-learning.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastgrpo

PROMPTS, GROUP = 32, 8


@dataclass(frozen=True)
class Settings:
    """How large the policy is, and how long and how often it learns."""

    vocab: int = 32_768
    hidden: int = 64
    contexts: int = 1024
    steps: int = 200
    seeds: int = 3
    sparsities: tuple[float, ...] = (0.0, 1e-3, 1e-2, 1e-1)
    start: float = 0.2  # probability of the right token when GRPO begins
    window: int = 10  # steps averaged for a point of the curve


QUICK = Settings(vocab=512, hidden=16, contexts=64, steps=12, seeds=2, sparsities=(0.0, 0.1))


class Policy(nn.Module):
    """An embedding, two layers and a head."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        hidden = settings.hidden
        self.prompts = nn.Embedding(settings.contexts, hidden)
        self.layers = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(),
                                    nn.Linear(2 * hidden, hidden))  # fmt: skip
        self.head = nn.Linear(hidden, settings.vocab, bias=False)

    def forward(self, prompts: Tensor) -> Tensor:
        return self.layers(self.prompts(prompts))


def half_trained(settings: Settings, seed: int) -> tuple[Policy, Tensor]:
    """Return a policy that knows some answers, and all right answers (contexts,)."""
    torch.manual_seed(seed)
    policy, answers = Policy(settings), torch.randperm(settings.vocab)[: settings.contexts]
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    every = torch.arange(settings.contexts)
    for _ in range(400):
        with torch.no_grad():
            known = fastgrpo.linear_logps(policy(every), policy.head.weight, answers).logps.exp()
        if known.mean() >= settings.start:
            break
        chosen = torch.randint(settings.contexts, (256,))
        logps = fastgrpo.linear_logps(policy(chosen), policy.head.weight, answers[chosen]).logps
        optimizer.zero_grad()
        (-logps.mean()).backward()
        optimizer.step()
    return policy, answers


def learn(settings: Settings, sparsity: float, seed: int) -> dict:
    """Return the mean reward of every step, and the mean number of kept entries per row."""
    policy, answers = half_trained(settings, seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    torch.manual_seed(1000 + seed)
    rewards, kept = [], []
    for step in tqdm(range(settings.steps), desc=f"sparsity {sparsity:g}, seed {seed}"):
        prompts = torch.randint(settings.contexts, (PROMPTS,))
        hidden = policy(prompts)
        with torch.no_grad():
            logp = (hidden @ policy.head.weight.t()).log_softmax(-1)
            tokens = torch.multinomial(logp.exp(), GROUP, replacement=True)
        reward = (tokens == answers[prompts, None]).float().flatten()
        old_logps, tokens = logp.gather(1, tokens).view(-1, 1), tokens.view(-1, 1)
        out = fastgrpo.grpo_loss(
            hidden.repeat_interleave(GROUP, 0)[:, None],
            policy.head.weight,
            tokens,
            torch.ones_like(tokens, dtype=torch.bool),
            fastgrpo.group_advantages(reward, GROUP),
            old_logps=old_logps,
            sparsity=sparsity,
            seed=step if sparsity else None,
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        rewards.append(reward.mean().item())
        if sparsity:
            kept.append(out.metrics["kept_entries"].item())
    return {"rewards": rewards, "kept_entries": statistics.fmean(kept or [settings.vocab])}


def curve(rewards: list[float], window: int) -> list[float]:
    return [statistics.fmean(rewards[i : i + window]) for i in range(0, len(rewards), window)]


def compare(settings: Settings) -> dict:
    """Return settings and, for each sparsity, the curves of its seeds."""
    runs = {}
    for sparsity in settings.sparsities:
        seeds = [learn(settings, sparsity, seed) for seed in range(settings.seeds)]
        runs[f"{sparsity:g}"] = {
            "rewards": [[round(x, 5) for x in curve(s["rewards"], settings.window)] for s in seeds],
            "kept_entries": statistics.fmean(s["kept_entries"] for s in seeds),
        }
    return {"settings": asdict(settings), "runs": runs}


def table(result: dict) -> str:
    """Return kept entries, reward over each quarter of the run, and the gap to the exact runs."""
    lines = ["sparsity | kept entries | reward by quarter | minus exact, mean of the run (seeds)"]
    exact = [statistics.fmean(r) for r in result["runs"]["0"]["rewards"]]
    for sparsity, run in result["runs"].items():
        points = len(run["rewards"][0])
        mean = [statistics.fmean(column) for column in zip(*run["rewards"], strict=True)]
        quarters = [statistics.fmean(mean[i * points // 4 : max((i + 1) * points // 4, 1)] or mean)
                    for i in range(4)]  # fmt: skip
        gaps = [statistics.fmean(r) - e for r, e in zip(run["rewards"], exact, strict=True)]
        lines.append(
            f"{sparsity} | {run['kept_entries']:.0f} | "
            f"{' '.join(f'{q:.3f}' for q in quarters)} | "
            f"{statistics.fmean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})"
        )
    lines.append(f"spread of the exact runs over seeds: {statistics.stdev(exact):.4f}")
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Draw the reward against the step: mean and range of the seeds."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    window = result["settings"]["window"]
    for sparsity, run in result["runs"].items():
        columns = list(zip(*run["rewards"], strict=True))
        steps = [window * (i + 0.5) for i in range(len(columns))]
        label = "exact" if sparsity == "0" else f"τ = {sparsity}, {run['kept_entries']:.0f} entries"
        (line,) = axes.plot(steps, [statistics.fmean(c) for c in columns], label=label)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.set_title(f"Mean and range of {result['settings']['seeds']} seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


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
    (options.output_dir / "sparse-learning.json").write_text(text, encoding="utf-8")
    plot(result, options.output_dir / "sparse-learning.png")
    print(table(result))


if __name__ == "__main__":
    main()
