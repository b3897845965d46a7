"""Train a small language model, sample from it and record what its rows look like.

    python -m benchmarks.time_model.workload --maths train.jsonl --cache FOLDER

How many entries a sparse backward keeps depends on the entropy and on the tails of a policy's
distribution. No download is needed. The text is the Python source that is installed, and
grade-school mathematics where a file of GSM8K is given. A byte-level vocabulary is trained on it.

The record, benchmarks/results/workload-<device>-<date>.json, has the statistics of the completions
of several policies: the model as it was trained, and sharpened. Sharpened by s means that all
logits are multiplied by s. That is, token by token, the policy which maximises the expected
log-prob under the trained model less 1 / (s - 1) times the KL divergence to it. It stands in for
what reinforcement learning does to entropy. It makes tails lighter than a reward would that knows
nothing of them.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import fastgrpo
from benchmarks import environment
from benchmarks.time_model.profiles import LARGER_VOCABS, RANKS, TAUS, RowStats, row_statistics
from fastgrpo.train.model import Policy
from fastgrpo.train.rollout import Rollout, generate

END, PAD = "<|endoftext|>", "<pad>"
BANDS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, float("inf"))  # nats
TAILS = (16, 64, 256)  # mass beyond so many entries
KEPT_ROWS = 64  # in the record, for `profiles.rl_like_batch`


@dataclass(frozen=True)
class Recipe:
    """A model and how long it is trained."""

    hidden: int
    layers: int
    vocab: int = 32768
    seconds: float = 360.0
    batch: int = 8
    length: int = 128
    learning_rate: float = 2e-3
    sampled: int = 2048  # vocabulary entries in the denominator until the last quarter
    megabytes: float = 12.0  # of source text
    seed: int = 0


CPU_RECIPE = Recipe(hidden=256, layers=4)
CUDA_RECIPE = Recipe(
    hidden=1024, layers=12, batch=64, length=256, learning_rate=6e-4, sampled=32768, megabytes=64.0
)


def source_texts(megabytes: float, seed: int) -> list[str]:
    """Return installed Python files and documentation, in random order."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib")}
    paths = [p for f in sorted(folders) for end in ("py", "rst") for p in Path(f).rglob(f"*.{end}")]
    random.Random(seed).shuffle(paths)
    texts, left = [], megabytes * 1e6
    for path in paths:
        # Generated tables are not what a model should learn to write.
        if not 500 < path.stat().st_size < 100_000:
            continue
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        left -= len(texts[-1])
        if left < 0:
            break
    return texts


def maths_texts(path: Path) -> list[tuple[str, str]]:
    """Return the questions and answers of a GSM8K file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows]


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of at most `vocab` tokens, as many as the texts give."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab, special_tokens=[END, PAD], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=PAD, padding_side="left"
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Return an untrained Qwen2-shaped model with tied embeddings."""
    torch.manual_seed(recipe.seed)
    heads = max(1, recipe.hidden // 64)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=3 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config).to(environment.device())


def cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, sampled: int | None) -> Tensor:
    """Return the mean negative log-prob of `ids` (N,); None: exactly.

    Else the denominator is an estimate: every token of the batch, and a uniform sample of the
    others that stands for all of them. The head is most of the work on a CPU.
    """
    vocab = weight.shape[0]
    if sampled is None or sampled >= vocab:
        return F.cross_entropy(F.linear(hidden, weight).float(), ids)
    own, target = ids.unique(return_inverse=True)
    others = torch.ones(vocab, dtype=torch.bool, device=ids.device)
    others[own] = False
    others = others.nonzero()[:, 0]
    drawn = others[torch.randperm(len(others), device=ids.device)[:sampled]]
    logits = F.linear(hidden, weight[torch.cat((own, drawn))]).float()
    stands_for = torch.ones(logits.shape[1], device=ids.device)
    stands_for[len(own) :] = len(others) / max(len(drawn), 1)
    return F.cross_entropy(logits + stands_for.log(), target)


def train(
    model: Qwen2ForCausalLM, recipe: Recipe, phases: list[tuple[float, Tensor]]
) -> dict[str, Any]:
    """Train on windows of token ids: each phase until its share of the time is over."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(recipe.seed)
    device, weight = environment.device(), model.get_output_embeddings().weight
    begun, steps, losses = time.monotonic(), 0, []
    while (share := (time.monotonic() - begun) / recipe.seconds) < 1:
        ids = next(ids for until, ids in phases if share < until)
        starts = torch.randint(len(ids) - recipe.length, (recipe.batch,), generator=generator)
        window = ids[starts[:, None] + torch.arange(recipe.length + 1)].to(device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1, (steps + 1) / 30) * (1 - share)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = model.base_model(window[:, :-1], use_cache=False).last_hidden_state
            # The last quarter of the time is exact: the tails are what is measured.
            sampled = recipe.sampled if share < 0.75 else None
            loss = cross_entropy(hidden.flatten(0, 1), weight, window[:, 1:].flatten(), sampled)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        losses.append(loss.item())
        if steps % 50 == 0:
            print(f"{share:4.0%} | step {steps} | loss {losses[-1]:.3f}", flush=True)
    last = losses[-max(1, min(20, steps // 8)) :]
    return {
        "steps": steps,
        "tokens": steps * recipe.batch * recipe.length,
        "final_loss": sum(last) / len(last),
        "seconds": round(time.monotonic() - begun, 1),
    }


def prepare(recipe: Recipe, maths: Path | None, cache: Path | None) -> tuple[Policy, list, dict]:
    """Return a trained policy, prompts that it was not trained on, and the facts of its training.

    With `cache`, a folder: load what is there, or leave it there.
    """
    facts_path = cache / "facts.json" if cache else None
    if facts_path and facts_path.exists():
        saved = json.loads(facts_path.read_text())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(cache)
        model = Qwen2ForCausalLM.from_pretrained(cache).to(environment.device())
    else:
        sources = source_texts(recipe.megabytes, recipe.seed)
        pairs = maths_texts(maths) if maths else []
        held_out = max(2, min(256, len(pairs) // 10))
        taught = [question + answer for question, answer in pairs[held_out:]]
        tokenizer = train_tokenizer(sources + taught, recipe.vocab)
        model = build_model(recipe, tokenizer)
        parts = len(sources) // 20 + 1
        phases = [(1.0, pack(tokenizer, sources[parts:]))]
        prompts = [text[:200] for text in sources[:parts]]
        if taught:
            phases = [(0.25, phases[0][1]), (1.0, pack(tokenizer, taught))]
            prompts = [question for question, _ in pairs[:held_out]]
        facts = {
            "text": {
                "source_files": len(sources),
                "source_tokens": len(phases[0][1]),
                "maths_examples": len(taught),
                "maths_tokens": len(phases[-1][1]) if taught else 0,
            },
            "training": train(model, recipe, phases),
        }
        saved = {"facts": facts, "prompts": prompts[:256]}
        if cache:
            model.save_pretrained(cache)
            tokenizer.save_pretrained(cache)
            facts_path.write_text(json.dumps(saved))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return (
        Policy(model.eval(), tokenizer, fastgrpo.head_of(model)),
        saved["prompts"],
        saved["facts"],
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return the texts' tokens in one row, an end after each."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([i for ids in encoded for i in (*ids, tokenizer.eos_token_id)])


@dataclass(frozen=True)
class Sample:
    """Completions of a policy, as rows of its head."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    ids: Tensor  # (N,)
    logps: Tensor  # (N,) nats
    scale: float  # of the logits


@torch.no_grad()
def sample(policy: Policy, prompts: list[str], tokens: int, sharpness: float = 1.0) -> Sample:
    """Return completions, one of each prompt, drawn at temperature 1 from the sharpened policy."""
    rollout: Rollout = generate(policy, prompts, tokens, temperature=1 / sharpness)
    mask = rollout.completion_mask
    hidden = policy.completion_hidden(rollout)[mask].float()
    logps = policy.logps(rollout, len(prompts), 1 / sharpness, "torch")[mask]
    weight = policy.head.weight.detach().float()
    return Sample(hidden, weight, rollout.completion_ids[mask], logps, sharpness)


def describe(stats: RowStats) -> dict[str, Any]:
    """Return the distributions of what is known of some rows, over all of them and by entropy."""

    def part(chosen: Tensor) -> dict[str, Any]:
        tails = {str(t): _quantiles(1 - stats.mass[chosen, RANKS.index(t)]) for t in TAILS}
        kept = {f"{tau:g}": _quantiles(stats.kept[chosen, i]) for i, tau in enumerate(TAUS)}
        larger = {
            str(vocab): {
                f"{tau:g}": _quantiles(stats.kept_larger[chosen, j, i])
                for i, tau in enumerate(TAUS)
            }
            for j, vocab in enumerate(LARGER_VOCABS)
        }
        return {
            "share": _rounded(chosen.float().mean().item()),
            "tail_mass": tails,
            "kept": kept,
            "kept_extrapolated": larger,
        }

    bands = []
    for low, high in zip(BANDS, BANDS[1:], strict=False):
        chosen = (stats.entropy >= low) & (stats.entropy < high)
        if chosen.any():
            bands.append({"from": low, "to": min(high, 99.0), **part(chosen)})
    deciles = stats.entropy.quantile(torch.arange(1, 10) / 10)
    everything = torch.ones_like(stats.entropy, dtype=torch.bool)
    return {
        "rows": len(stats.entropy),
        "entropy": {
            "mean": _rounded(stats.entropy.mean().item()),
            "deciles": [_rounded(x) for x in deciles.tolist()],
        },
        **part(everything),
        "bands": bands,
    }


def _quantiles(x: Tensor) -> dict[str, float]:
    found = {f"p{q}": x.quantile(q / 100).item() for q in (50, 90, 99)}
    found |= {"mean": x.mean().item(), "max": x.max().item()}
    return {name: _rounded(value) for name, value in found.items()}


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def profile_rows(stats: RowStats, count: int = KEPT_ROWS) -> list[list[float]]:
    """Return the cumulated masses of `count` rows, evenly spaced in the order of their entropy."""
    order = stats.entropy.argsort()
    chosen = order[torch.linspace(0, len(order) - 1, count).round().long()]
    return [[round(x, 7) for x in row] for row in stats.mass[chosen].tolist()]


def measure(
    policy: Policy, prompts: list[str], sharpness: list[float], completions: int, tokens: int
) -> list[dict[str, Any]]:
    """Return the description of one policy for each sharpness."""
    policies = []
    for s in sharpness:
        torch.manual_seed(0)
        chosen = [prompts[i % len(prompts)] for i in range(completions)]
        drawn = sample(policy, chosen, tokens, s)
        stats = row_statistics(drawn.hidden, drawn.weight, scale=s)
        name = "as trained" if s == 1 else f"sharpened {s:g}"
        print(f"{name}: entropy {stats.entropy.mean():.2f} nats, kept {stats.kept.mean(0)}")
        policies.append(
            {
                "name": name,
                "sharpness": s,
                "logp_mean": _rounded(drawn.logps.mean().item()),
                **describe(stats),
                "ranks": RANKS,
                "mass_rows": profile_rows(stats),
            }
        )
    return policies


def main(arguments: list[str] | None = None) -> Path:
    default = CUDA_RECIPE if torch.cuda.is_available() else CPU_RECIPE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--maths", type=Path, help="a GSM8K file, JSON lines")
    parser.add_argument("--cache", type=Path, help="a folder for the trained model")
    parser.add_argument("--sharpness", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--completions", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64, help="the longest completion")
    parser.add_argument("--output", type=Path, help="the record file")
    for name in ("hidden", "layers", "vocab", "batch", "length", "sampled", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name))
    for name in ("seconds", "learning_rate", "megabytes"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=float, default=getattr(default, name))
    options = parser.parse_args(arguments)
    recipe = Recipe(**{name: getattr(options, name) for name in asdict(default)})

    begun = time.monotonic()
    policy, prompts, facts = prepare(recipe, options.maths, options.cache)
    config = policy.model.config
    content = {
        **environment.facts("benchmarks.time_model.workload"),
        "model": {
            "parameters": sum(p.numel() for p in policy.model.parameters()),
            "vocab": config.vocab_size,
            "hidden": config.hidden_size,
            "layers": config.num_hidden_layers,
        },
        **facts,
        "policies": measure(
            policy, prompts, options.sharpness, options.completions, options.tokens
        ),
        "seconds": round(time.monotonic() - begun),
    }
    path = options.output or environment.record_path("workload-")
    environment.write_record(path, content)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
