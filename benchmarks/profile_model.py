"""Sample from a real model and record what the rows of its head look like.

    python -m benchmarks.profile_model MODEL --prompts train.jsonl --origin "where it is from"

MODEL is a folder or a GGUF file of a causal language model, and the prompts are a file of GSM8K.
How many entries a sparse backward keeps depends on the entropy and on the tails of the policy's
distribution, so completions are drawn at each temperature, and the rows that they were drawn from
are described. Logits over the temperature are what a trainer scores.

One update says how many tokens a PPO clip silences. Groups of completions are sampled. A fair coin
per completion stands in for the reward, so that every group has advantages. One AdamW step is taken
from its initial state on the first half of the prompts. Then every completion is scored again: a
second pass over the same tokens sees the first half's figures, a second mini-batch of the rollout
those of the other half.

The record, benchmarks/results/profile-<model>-<date>.json, has no weights and no text.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import fastgrpo
from benchmarks import environment
from benchmarks.profiles import (
    MASS_RANKS,
    TAUS,
    TOP_K,
    TOP_P,
    RowStats,
    curve_ranks,
    row_statistics,
)
from fastgrpo import ModelHead
from fastgrpo.train import gsm8k, microbatches
from fastgrpo.train.completions import Rollout
from fastgrpo.train.model import Policy
from fastgrpo.train.rollout import encode
from fastgrpo.train.sampler import ModelSampler
from fastgrpo.train.sampling import Sampling

BANDS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, float("inf"))  # nats
EPSILON = 0.2
MAX_TOKENS = 4096  # of one forward
UPDATE = {
    "loss": "dapo preset, beta 0, epsilon 0.2",
    "rewards": "a fair coin per completion, normalised by group",
    "optimizer": "AdamW, first step, betas 0.9 0.98, no weight decay, gradient norm at most 1",
}


def load(path: Path) -> Policy:
    """Return the policy in a folder, or in a GGUF file, with its weights as fp32."""
    where = {"pretrained_model_name_or_path": path}
    if path.is_file():
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    # A repetition penalty that came with the model would change what is drawn.
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.to(environment.device())
    return Policy(model, tokenizer, fastgrpo.head_of(model))


def weights_hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of weights."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def micro_batches(policy: Policy, rollout: Rollout) -> Iterator[tuple[Tensor, Rollout, Tensor]]:
    """Yield completions, their part of the rollout, and its hidden states (N, H)."""
    everything = torch.arange(len(rollout), device=rollout.lengths.device)
    for chosen in microbatches.micro_batches(rollout, everything, MAX_TOKENS, policy.layout):
        batch = rollout[chosen]
        yield chosen, batch, policy.completion_hidden(batch)


@torch.no_grad()
def describe_policy(
    policy: Policy, prompts: list[str], tokens: int, temperature: float, curves: int
) -> dict[str, Any]:
    """Return the description of one completion of each prompt, drawn at `temperature`."""
    rollout = ModelSampler(policy).sample(
        encode(policy, prompts), 1, Sampling(tokens, temperature, seed=(torch.initial_seed(),))
    )
    hidden = torch.cat([states for _, _, states in micro_batches(policy, rollout)])
    weight, scale = policy.head.weight, 1 / temperature
    stats = row_statistics(hidden, weight, scale=scale)
    logps = policy.logps(rollout, MAX_TOKENS, temperature, "torch")
    chosen = typical_rows(stats, curves)
    return {
        "name": f"temperature {temperature:g}",
        "temperature": temperature,
        "logp": {"mean": _rounded(logps.mean()), "deciles": _deciles(logps.cpu())},
        **describe(stats),
        "ranks": curve_ranks(weight.shape[0]),
        "curves": [[round(x, 2) for x in row] for row in stats.curve[chosen].tolist()],
    }


def typical_rows(stats: RowStats, count: int) -> Tensor:
    """Return rows in the order of their entropy: of each of `count` parts, the median by kept."""
    kept = stats.kept[:, TAUS.index(1e-3)]
    parts = stats.entropy.argsort().tensor_split(count)
    return torch.stack([part[kept[part].argsort()[len(part) // 2]] for part in parts])


def describe(stats: RowStats) -> dict[str, Any]:
    """Return the distributions of what is known of some rows, over all of them and by entropy."""

    def part(chosen: Tensor) -> dict[str, Any]:
        tails = 1 - stats.mass[chosen]
        return {
            "share": _rounded(chosen.float().mean()),
            "tail_mass": {str(r): _quantiles(tails[:, i]) for i, r in enumerate(MASS_RANKS)},
            "kept": {f"{tau:g}": _quantiles(stats.kept[chosen, i]) for i, tau in enumerate(TAUS)},
            "nucleus": _quantiles(stats.nucleus[chosen].float())
            | {"single": _rounded((stats.nucleus[chosen] == 1).float().mean())},
        }

    bands = []
    for low, high in zip(BANDS, BANDS[1:], strict=False):
        chosen = (stats.entropy >= low) & (stats.entropy < high)
        if chosen.any():
            bands.append({"from": low, "to": min(high, 99.0), **part(chosen)})
    return {
        "rows": len(stats.entropy),
        "entropy": {"mean": _rounded(stats.entropy.mean()), "deciles": _deciles(stats.entropy)},
        **part(torch.ones_like(stats.entropy, dtype=torch.bool)),
        "bands": bands,
    }


def measure_clipping(
    policy: Policy, prompts: list[str], group: int, tokens: int, rates: list[float]
) -> dict[str, Any]:
    """Return what one update at each of the learning rates does to the ratios of a rollout."""
    rollout = ModelSampler(policy).sample(
        encode(policy, prompts), group, Sampling(tokens, seed=(torch.initial_seed(),))
    )
    count, device = len(rollout), rollout.lengths.device
    before = policy.logps(rollout, MAX_TOKENS, 1.0, "torch")
    coins = torch.randint(2, (count,)).float().to(device)
    rollout = replace(rollout, advantages=fastgrpo.group_advantages(coins, group))
    part = torch.arange(len(prompts) // 2 * group, device=device)
    learnt = rollout.tokens_of(part)
    normalizer = learnt.sum().item()
    for _, batch, hidden in micro_batches(policy, rollout[part]):
        fastgrpo.grpo_loss(
            hidden,
            policy.head.weight,
            batch.token_ids,
            None,
            batch.advantages,
            cu_seqlens=batch.cu_seqlens,
            config="dapo",
            normalizer=normalizer,
            **policy.head.options(),
        ).loss.backward()
    parameters = [p for p in policy.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    start = [p.detach().clone() for p in parameters]
    updates = []
    for rate in rates:
        torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.0).step()
        change = policy.logps(rollout, MAX_TOKENS, 1.0, "torch") - before
        outcome = {"learning_rate": rate}
        for name, half in (("same_tokens", learnt), ("other_tokens", ~learnt)):
            signs = rollout.advantages.sign().repeat_interleave(rollout.lengths)
            outcome[name] = clipping(change[half], signs[half])
        updates.append(outcome)
        print(outcome, flush=True)
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    return {
        "settings": UPDATE
        | {"prompts": len(prompts), "group": group, "tokens": len(rollout.token_ids)}
        | {"tokens_learnt": normalizer, "gradient_norm": _rounded(norm)},
        "updates": updates,
    }


def clipping(change: Tensor, signs: Tensor) -> dict[str, Any]:
    """Return the share of tokens whose gradient the clip takes, and that of ratios off the range.

    `change` is the logarithm of the ratio, `signs` that of the advantage; both are (N,).
    """
    ratio = change.exp()
    high, low = ratio > 1 + EPSILON, ratio < 1 - EPSILON
    return {
        "clipped": _rounded(((high & (signs > 0)) | (low & (signs < 0))).float().mean()),
        "outside": _rounded((high | low).float().mean()),
        "log_ratio": _quantiles(change.abs()),
    }


def _quantiles(x: Tensor) -> dict[str, float]:
    found = {f"p{q}": x.quantile(q / 100) for q in (10, 50, 90, 99)}
    return {k: _rounded(v) for k, v in (found | {"mean": x.mean(), "max": x.max()}).items()}


def _deciles(x: Tensor) -> list[float]:
    return [_rounded(v) for v in x.quantile(torch.arange(1, 10) / 10)]


def _rounded(x: Tensor | float) -> float:
    return float(f"{float(x):.4g}")


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model folder or a GGUF file")
    parser.add_argument("--prompts", type=Path, required=True, help="a GSM8K file, JSON lines")
    parser.add_argument("--name", help="of the model; by default that of the file or folder")
    parser.add_argument("--origin", required=True, help="where the weights are from, their licence")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.6, 1.3])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 3e-6, 1e-5, 3e-5])
    parser.add_argument("--completions", type=int, default=48, help="at each temperature")
    parser.add_argument("--tokens", type=int, default=96, help="the longest completion")
    parser.add_argument("--curves", type=int, default=128, help="rows of a policy in the record")
    parser.add_argument("--groups", type=int, default=8, help="prompts of the update's rollout")
    parser.add_argument("--group", type=int, default=8, help="completions of each of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="the record file")
    options = parser.parse_args(arguments)

    begun = time.monotonic()
    policy = load(options.model)
    if policy.head != ModelHead(policy.head.weight, None, 1.0, None):
        parser.error(f"expected a head that is a product alone, got {policy.head.options()}")
    examples = gsm8k.read_examples(str(options.prompts), policy.tokenizer)
    prompts = [example.prompt for example in examples[: options.completions + options.groups]]
    name = options.name or options.model.stem
    vocab, width = policy.head.weight.shape
    content = {
        **environment.facts("benchmarks.profile_model"),
        "model": {
            "name": name,
            "origin": options.origin,
            "sha256": weights_hashes(options.model),
            "parameters": sum(p.numel() for p in policy.model.parameters()),
            "vocab": vocab,
            "hidden": width,
            "dtype": str(policy.head.weight.dtype).removeprefix("torch."),
        },
        "prompts": {
            "file": options.prompts.name,
            "sha256": hashlib.sha256(options.prompts.read_bytes()).hexdigest(),
            "template": "fastgrpo.train.gsm8k.build_prompt",
            "profile": [0, options.completions],
            "update": [options.completions, options.completions + options.groups],
        },
        "seed": options.seed,
        "longest_completion": options.tokens,
        "truncation": {"top_p": TOP_P, "top_k": TOP_K},
        "policies": [],
    }
    for temperature in options.temperatures:
        torch.manual_seed(options.seed)
        found = describe_policy(
            policy, prompts[: options.completions], options.tokens, temperature, options.curves
        )
        kept = {tau: part["mean"] for tau, part in found["kept"].items()}
        print(f"{found['name']}: entropy {found['entropy']['mean']} nats, kept {kept}", flush=True)
        content["policies"].append(found)
    torch.manual_seed(options.seed)
    rates = (options.group, options.tokens, options.rates)
    content["one_update"] = measure_clipping(policy, prompts[options.completions :], *rates)
    content["seconds"] = round(time.monotonic() - begun)
    path = options.output or environment.RESULTS / (
        f"profile-{environment.slug(name)}-{environment.now():%Y-%m-%d}.json"
    )
    environment.write_record(path, content)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
