"""Whole runs: the files they write, how they end, and what must not change the result."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastgrpo.train.arithmetic import arithmetic_task, character_tokenizer
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.not_finite import DUMP, STEPS, NotFiniteError
from fastgrpo.train.optimizer import MasterAdamW
from fastgrpo.train.rewards import Reward, one_by_one

from .conftest import TINY_RUN, command, read_metrics, with_copy

PROMISED = {
    "step", "reward", "loss", "kl", "entropy", "tokens_per_s", "learning_rate",
    "grad_norm", "clip_low", "clip_high", "live_rows", "unscorable", "reward_std",
    "rewards/correct/mean", "rewards/correct/std", "completions/mean_length",
    "flat_groups", "groups_resampled",
    "sampler_gap_mean", "sampler_gap_max", "completions/min_length",
    "completions/max_length", "completions/clipped_ratio",
}  # fmt: skip


def test_a_run_leaves_every_file_with_its_keys(script, tmp_path) -> None:
    assert script.main(TrainConfig(**TINY_RUN, output_dir=str(tmp_path))) == 0
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows if row.get("eval_seconds", 0) > 0] == [2]
    for row in rows:
        assert row.keys() >= PROMISED and row["sampler_gap_max"] < 1e-3
        assert all(math.isfinite(row[key]) for key in PROMISED), row
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"accuracy_before", "accuracy_after", "seconds", "seed", "config"} <= result.keys()
    assert (
        0 <= result["accuracy_before"] <= 1 and result["steps"] == 3 and not result["interrupted"]
    )
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert "## After" in (tmp_path / "samples.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    assert (
        model.vocab_size == len(tokenizer)
        and (tmp_path / "checkpoint" / "model.safetensors").exists()
    )
    ids = character_tokenizer()("12+34=")["input_ids"]
    assert tokenizer("12+34=")["input_ids"] == ids and tokenizer.decode(ids) == "12+34="
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint", "metrics.jsonl", "result.json", "reward.png", "samples.md", "settings.json"
    ]  # fmt: skip


def test_advantages_of_dr_grpo_are_not_divided_by_the_spread(script, tmp_path, monkeypatch) -> None:
    rollouts, update = [], script.update
    monkeypatch.setattr(
        script, "update", lambda *given: (rollouts.append(given[2]), update(*given))[1]
    )
    task = arithmetic_task(0, 8)
    length = Reward("length", lambda completions, **_: [float(len(text)) for text in completions])
    task = dataclasses.replace(task, rewards=(length,))
    script.main(TrainConfig(**TINY_RUN, loss="dr_grpo", output_dir=str(tmp_path)), task)
    groups = torch.stack([r.rewards for r in rollouts]).view(-1, TINY_RUN["num_generations"])
    advantages = torch.stack([r.advantages for r in rollouts]).view_as(groups).double()
    assert groups.std(dim=1).max() > 0
    torch.testing.assert_close(
        advantages, groups - groups.mean(1, keepdim=True), rtol=1e-6, atol=1e-6
    )


def test_a_seed_gives_the_same_run_again(script, tmp_path) -> None:
    kept = [key for key in PROMISED if key != "tokens_per_s"]
    runs = []
    for name in ("a", "b"):
        script.main(TrainConfig(**TINY_RUN, num_iterations=2, output_dir=str(tmp_path / name)))
        runs.append([[row[key] for key in kept] for row in read_metrics(tmp_path / name)])
    assert runs[0] == runs[1]


def test_learning_rate_0_leaves_the_weights_as_they_were(script, tmp_path) -> None:
    for dtype in ("float32", "bfloat16"):
        states = []
        for name, steps in (("start", 0), ("end", 3)):
            folder = tmp_path / dtype / name
            script.main(
                TrainConfig(
                    **TINY_RUN | {"max_steps": steps},
                    learning_rate=0.0,
                    dtype=dtype,
                    output_dir=str(folder),
                )
            )
            states.append(
                AutoModelForCausalLM.from_pretrained(
                    folder / "checkpoint", dtype="auto"
                ).state_dict()
            )
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.filterwarnings("ignore:max_tokens_per_microbatch")
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_micro_batches_do_not_change_the_gradient(
    script, policy, rollout, config, loss: str
) -> None:
    config = dataclasses.replace(config, loss=loss, beta=0.04, max_grad_norm=1e9)
    old = policy.logps(rollout, 1000, 1.0, "torch") + 0.1 * torch.randn(rollout.token_ids.shape)
    rollout = dataclasses.replace(rollout, old_logps=old, ref_logps=old - 0.1)
    results = []
    for size in (1000, 60, 1):
        learner = with_copy(policy)
        optimizer = MasterAdamW(learner.model.parameters(), 0.0, 10)
        grads = []
        optimizer.step = lambda *_, o=optimizer, g=grads: (
            g.extend(p.grad.clone() for p in o.masters) or 0.0
        )
        _, metrics = script.update(
            learner,
            optimizer,
            rollout,
            dataclasses.replace(config, max_tokens_per_microbatch=size),
        )
        results.append((grads, metrics))
    for grads, metrics in results[1:]:
        for grad, whole in zip(grads, results[0][0], strict=True):
            torch.testing.assert_close(
                grad, whole, atol=1e-6 * whole.abs().max().item() + 1e-8, rtol=2e-5
            )
        assert metrics == pytest.approx(results[0][1], rel=1e-4, abs=1e-6)


def test_a_step_makes_better_completions_likelier(script, policy, rollout, config) -> None:
    on_policy = dataclasses.replace(config, beta=0.0)
    before = policy.logps(rollout, 1000, 1.0, "torch")
    optimizer = MasterAdamW(policy.model.parameters(), 2e-3, 10**6)
    script.update(policy, optimizer, rollout, on_policy)
    change = policy.logps(rollout, 1000, 1.0, "torch") - before
    assert (change * rollout.advantages.repeat_interleave(rollout.lengths)).sum() > 0


def test_a_gradient_that_is_not_finite_skips_the_step(script, policy, rollout, config) -> None:
    on_policy = dataclasses.replace(config, beta=0.0)
    before = copy.deepcopy(policy.model.state_dict())
    optimizer = MasterAdamW(policy.model.parameters(), 1e-2, 10**6)
    poisoned = dataclasses.replace(
        rollout, advantages=rollout.advantages.index_fill(0, torch.tensor(3), math.inf)
    )
    _, metrics = script.update(policy, optimizer, poisoned, on_policy)
    assert metrics["skipped"] == 1
    assert all(
        torch.equal(before[name], value) for name, value in policy.model.state_dict().items()
    )
    _, metrics = script.update(policy, optimizer, rollout, on_policy)
    assert metrics["skipped"] == 0
    assert all(value.isfinite().all() for value in policy.model.state_dict().values())


def test_a_run_ends_when_no_loss_is_finite_any_more(script, tmp_path, monkeypatch) -> None:
    """Its checkpoint has the weights from before, and the completions are there to be looked at."""
    monkeypatch.setattr(script, "centred", lambda rewards, _: torch.full(rewards.shape, math.nan))
    monkeypatch.setattr(
        script.fastgrpo,
        "group_advantages",
        lambda rewards, *_, **__: rewards,  # NaN, not 0
    )
    config = TrainConfig(**TINY_RUN | {"max_steps": 9}, output_dir=str(tmp_path))
    with pytest.raises(NotFiniteError, match="not finite in 5 steps in a row"):
        script.main(config)
    rows = read_metrics(tmp_path)
    assert [row["skipped"] for row in rows] == [1] * STEPS
    result = json.loads((tmp_path / "result.json").read_text())
    assert "NotFiniteError" in result["error"]
    dump = load_file(tmp_path / DUMP)
    assert dump["advantages"].isnan().all()
    assert len(dump["token_ids"]) == dump["lengths"].sum() and "prompts.3" in dump
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_unscorable_completions_are_counted_and_the_run_goes_on(
    script, tmp_path, monkeypatch
) -> None:
    def reward(completion: str, answer: str) -> float | None:
        kind = sum(map(ord, completion)) % 5
        return 1 / 0 if kind == 4 else (0.0, 1.0, math.nan, None)[kind]

    rewards = (Reward("flaky", one_by_one(reward)),)
    task = dataclasses.replace(arithmetic_task(0, 8), rewards=rewards)
    monkeypatch.setattr(script, "load_task", lambda *_: task)
    with pytest.warns(UserWarning, match="unscorable"):
        assert script.main(TrainConfig(**TINY_RUN, output_dir=str(tmp_path))) == 0
    rows = read_metrics(tmp_path)
    assert len(rows) == 3 and all(
        0 < row["unscorable"] <= 16 and math.isfinite(row["loss"]) for row in rows
    )


def test_nothing_scorable_is_no_gradient_and_no_crash(script, tmp_path, monkeypatch) -> None:
    nothing = Reward("nothing", lambda completions: [None] * len(completions))
    task = dataclasses.replace(arithmetic_task(0, 8), rewards=(nothing,))
    monkeypatch.setattr(script, "load_task", lambda *_: task)
    assert (
        script.main(TrainConfig(**TINY_RUN | {"max_steps": 1}, beta=0.0, output_dir=str(tmp_path)))
        == 0
    )
    (row,) = read_metrics(tmp_path)
    assert row["reward"] is None and row["unscorable"] == 16 and row["grad_norm"] == 0.0


def test_bf16_weights_follow_fp32_masters() -> None:
    """Steps of 1e-5 are far below what a bf16 weight of 1 can show, and add up all the same."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], 1e-4, 10**6)
    for _ in range(200):
        for _ in range(2):
            optimizer.backward(weight.float().sum() * 0.5)
        norm = optimizer.step(0.0, 1e9)
    assert norm == pytest.approx(2.0)
    assert weight.grad is None
    torch.testing.assert_close(weight.float(), torch.full((4,), 1 - 0.019), atol=0.004, rtol=0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupted_run_saves_before_it_exits(tmp_path, signum: signal.Signals) -> None:
    flags = [(f"--{name}", value) for name, value in (TINY_RUN | {"max_steps": 10**6}).items()]
    arguments, environment = command(
        *[part for flag in flags for part in flag], "--output_dir", tmp_path
    )
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "metrics.jsonl").exists() and read_metrics(tmp_path)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, output.decode()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["interrupted"] and result["accuracy_after"] is None
    assert result["steps"] == len(read_metrics(tmp_path)) >= 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert not list(tmp_path.glob("*.tmp*"))


def test_gsm8k_from_the_command_line(tmp_path, model_folder) -> None:
    data = tmp_path / "train.jsonl"
    rows = [
        {"question": f"What is {i} + {i}?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"}
        for i in range(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    arguments, environment = command(
        "--task", "gsm8k", "--data", data, "--eval-data", data, "--model", model_folder,
        "--output-dir", out, "--max-steps", 3, "--num-prompts", 2, "--num-generations", 3,
        "--max-tokens-per-microbatch", 400, "--eval-size", 4, "--max-completion-length", 12,
        "--num-iterations", 2, "--learning-rate", "1e-4", "--backend", "torch", "--device", "cpu",
        "--gradient-checkpointing",
    )  # fmt: skip
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step 3 | reward" in done.stdout and "| tok/s" in done.stdout
    metrics = read_metrics(out)
    assert len(metrics) == 3 and all(row["unscorable"] == 0 for row in metrics)
    assert json.loads((out / "result.json").read_text())["config"]["num_iterations"] == 2
    assert "<reasoning>" in (out / "samples.md").read_text()
    trained = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert trained.config.vocab_size == 258
