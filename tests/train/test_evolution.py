"""REINFORCE over parameters: exact weights, little memory, several processes, and it learns."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import weakref
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fastgrpo.train import evolution
from fastgrpo.train.evolution import (
    Evolution,
    add_noises,
    generator,
    noise_like,
    perturbed,
    round_at_random,
    shape_by_rank,
)
from fastgrpo.train.fitness import mean_reward
from fastgrpo.train.model import Policy
from fastgrpo.train.rewards import Reward
from fastgrpo.train.rollout import encode
from fastgrpo.train.sampling import Sampling
from fastgrpo.train.tasks import Example, Task

from .conftest import ROOT

SCRIPT = ROOT / "examples" / "evolution.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example script, imported."""
    spec = importlib.util.spec_from_file_location("evolution_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_come_back_to_the_bit_over_many_candidates(
    policy, sampler, dtype: torch.dtype
) -> None:
    """With noise up to a hundred times the weights, which adding and subtracting would lose."""
    policy.model.to(dtype)
    prompts, before = encode(policy, ["1+2=", "34+5="]), bits(policy.model)
    for seed in range(30):
        with perturbed(policy.model, seed, scale=(2.0, -0.02)[seed % 2]):
            sampler.sample(prompts, 1, Sampling(2, temperature=0.0))
        assert same_bits(bits(policy.model), before)
    add_noises(policy.model, [1], [0.01])
    assert not same_bits(bits(policy.model), before)


def test_adding_and_subtracting_would_not_bring_them_back(policy) -> None:
    """What the test above would miss if it could not fail."""
    before = bits(policy.model)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            noise = 0.02 * torch.randn_like(parameter)
            parameter.add_(noise).sub_(noise)
    assert not same_bits(bits(policy.model), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_come_back_after_an_error_in_the_middle_of_a_forward(
    policy, sampler, error: type
) -> None:
    prompts, before = encode(policy, ["1+2="]), bits(policy.model)

    def fail(*_: object) -> None:
        raise error

    hook = policy.model.model.layers[1].mlp.act_fn.register_forward_pre_hook(fail)
    with pytest.raises(error), perturbed(policy.model, 0, 0.1):
        sampler.sample(prompts, 1, Sampling(1, temperature=0.0))
    hook.remove()
    assert same_bits(bits(policy.model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in policy.model.modules())


@pytest.mark.parametrize("slice_size", [2**20, 1000], ids=["whole", "slices"])
def test_a_candidate_computes_with_the_noise_that_the_update_adds(
    policy, monkeypatch, slice_size: int
) -> None:
    """The tied embedding and head have one noise; inside and update agree on every weight."""
    monkeypatch.setattr(evolution, "SLICE", slice_size)
    moved = copy.deepcopy(policy.model)
    add_noises(moved, [7], [0.05])
    ids = torch.randint(12, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = moved(input_ids=ids).logits
        with perturbed(policy.model, 7, 0.05):
            actual = policy.model(input_ids=ids).logits
        plain = policy.model(input_ids=ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
    assert (plain - expected).abs().max() > 0.1


def test_weights_that_are_read_past_their_module_are_refused() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.called(x) @ self.read.weight

    model = Reader()
    with pytest.raises(ValueError, match="got none for read.weight, read.bias"):
        with perturbed(model, 0, 0.1):
            model(torch.ones(4))
    model.read.requires_grad_(False)
    with perturbed(model, 0, 0.1):
        model(torch.ones(4))


def test_noise_is_standard_normal_and_differs_by_seed_and_parameter() -> None:
    device, part = torch.device("cpu"), torch.empty(100_000)
    drawn = [noise_like(part, generator(*key, device)) for key in ((0, 0), (0, 1), (1, 0))]
    assert torch.equal(drawn[0], noise_like(part, generator(0, 0, device)))
    # Five standard errors of each statistic.
    bound = 5 / part.numel() ** 0.5
    for i, noise in enumerate(drawn):
        assert abs(noise.mean()) < bound and abs(noise.var() - 1) < bound * 2**0.5
        for other in drawn[:i]:
            assert abs((noise * other).mean()) < bound


def test_bf16_updates_below_the_last_bit_are_kept_on_average() -> None:
    """A move of 1/64 of the last bit of 1.0; rounding to nearest would lose all of it."""
    x = torch.full((400_000,), 1 + 2**-7 / 64)
    rounded = round_at_random(x, torch.Generator().manual_seed(0))
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    share = (rounded > 1).float().mean().item()
    assert abs(share - 1 / 64) < 5 * (1 / 64 / x.numel()) ** 0.5
    assert torch.equal(round_at_random(-x, torch.Generator().manual_seed(0)), -rounded)
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(round_at_random(exact.float(), torch.Generator().manual_seed(2)), exact)


def test_ranks_share_what_is_equal_and_pass_over_what_has_no_score() -> None:
    nan = float("nan")
    assert shape_by_rank(torch.tensor([3.0, 1.0, 2.0])).tolist() == [0.5, -0.5, 0.0]
    assert shape_by_rank(torch.tensor([1.0, 1.0, 2.0])).tolist() == [-0.25, -0.25, 0.5]
    assert shape_by_rank(torch.full((4,), 7.0)).tolist() == [0.0] * 4
    assert shape_by_rank(torch.tensor([nan, 1.0, 2.0])).tolist() == [0.0, -0.25, 0.25]
    assert torch.equal(
        shape_by_rank(torch.tensor([0.0, 5.0, 9.0])), shape_by_rank(torch.tensor([-7.0, 0.0, 1e9]))
    )


class Quadratic(nn.Module):
    """Loss |w - 3|^2 of a module that is called."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self) -> Tensor:
        return (self.w - 3).square().sum()


@pytest.mark.parametrize("shaping", ["ranks", "zscore"])
def test_it_climbs(shaping: str) -> None:
    model = Quadratic()
    search = Evolution(model, sigma=0.1, learning_rate=0.02, num_pairs=8, shaping=shaping)
    for _ in range(150):
        scores = []
        for candidate in search.candidates():
            with search.perturbed(candidate):
                scores.append(-model())
        search.update(torch.stack(scores).detach())
    assert model().item() < 1.0 < 72.0


def test_the_update_is_the_estimator_of_its_formula() -> None:
    """sum_i shaped_i * sign_i * noise_i / (2 * num_pairs * sigma), on a tensor of one slice."""
    model, sigma = Quadratic(), 0.3
    search = Evolution(model, sigma=sigma, learning_rate=0.7, num_pairs=3, shaping="zscore", seed=5)
    scores = torch.tensor([1.0, 4.0, 2.0, 2.0, -3.0, 0.5])
    expected = torch.zeros(8)
    advantages = (scores - scores.mean()) / (scores.std() + 1e-4)
    for candidate, advantage in zip(search.candidates(), advantages, strict=True):
        noise = noise_like(model.w, generator(candidate.seed, 0, model.w.device))
        expected += 0.7 * advantage * candidate.sign * noise / (6 * sigma)
    search.update(scores)
    torch.testing.assert_close(model.w.detach(), expected, atol=1e-6, rtol=1e-5)
    assert len({c.seed for c in search.candidates()}) == 3 and search.step == 1


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that tensors made within this context, none of them a weight, hold at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.made: list[weakref.ref] = []
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves(out)
        self.made += [weakref.ref(x) for x in leaves if isinstance(x, Tensor)]
        self.made = [ref for ref in self.made if ref() is not None]
        storages = [x.untyped_storage() for ref in self.made if (x := ref()) is not None]
        held = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in self.weights}
        self.peak = max(self.peak, sum(held.values()))
        return out


def network(depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(256, 256) for _ in range(depth)))


def peak(model: nn.Module, *, perturb: bool) -> int:
    with torch.no_grad(), Watch(model) as watch:
        if perturb:
            search = Evolution(model, sigma=0.1, learning_rate=0.1, num_pairs=4)
            for candidate in search.candidates():
                with search.perturbed(candidate):
                    model(torch.zeros(4, 256))
            search.update(torch.arange(8.0))
        else:
            model(torch.zeros(4, 256))
    return watch.peak


def test_memory_is_that_of_inference_and_one_module(monkeypatch) -> None:
    """Whatever the depth and the population, a step adds one module's weights and noise slices."""
    monkeypatch.setattr(evolution, "SLICE", 4096)
    module, noise = 256 * 257 * 4, 4096 * 4
    extra = [
        peak(network(depth), perturb=True) - peak(network(depth), perturb=False)
        for depth in (2, 12)
    ]
    assert module < extra[0] <= module + 3 * noise
    assert extra[1] == extra[0]


@pytest.mark.slow
def test_it_learns_the_embedded_task_through_its_protocol(policy, sampler, task) -> None:
    """From random weights: to open every answer with a 1, which a reward on the text asks for."""
    opens_with_1 = Reward(
        "opens_with_1", lambda completions: [float(text.startswith("1")) for text in completions]
    )
    wanted = dataclasses.replace(task, rewards=(opens_with_1,))
    search = Evolution(policy.model, sigma=0.02, learning_rate=0.004, num_pairs=8)
    examples = task.train[:16]
    before = mean_reward(policy, sampler, wanted, examples, 2)
    for _ in range(12):
        scores = []
        for candidate in search.candidates():
            with search.perturbed(candidate):
                scores.append(mean_reward(policy, sampler, wanted, examples, 2))
        search.update(torch.tensor(scores))
    assert before < 0.5 and mean_reward(policy, sampler, wanted, task.held_out, 2) > 0.9


def test_the_mean_reward_leaves_out_what_has_no_score(policy: Policy, sampler) -> None:
    rewards = iter([1.0, None, 0.5, None, None])
    task = Task(
        "a", [], [], (Reward("next", lambda completions: [next(rewards) for _ in completions]),)
    )
    examples = [Example("1+2=", "3")] * 3
    assert mean_reward(policy, sampler, task, examples, 2) == 0.75
    assert math.isnan(mean_reward(policy, sampler, task, examples[:2], 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma: expected a positive number, got 0.0"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number >= 0"),
        ({"num_pairs": 0}, "num_pairs: expected at least 1"),
        ({"shaping": "softmax"}, "shaping: expected one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_settings_are_named(options: dict, message: str) -> None:
    good = {"sigma": 0.1, "learning_rate": 0.1, "num_pairs": 2}
    with pytest.raises(ValueError, match=message):
        Evolution(Quadratic(), **good | options)


def test_bad_weights_and_scores_are_named() -> None:
    with pytest.raises(ValueError, match="fp32 or bf16 parameters, got torch.float16 in w"):
        Evolution(Quadratic().half(), sigma=0.1, learning_rate=0.1, num_pairs=2)
    search = Evolution(Quadratic(), sigma=0.1, learning_rate=0.1, num_pairs=2)
    with pytest.raises(ValueError, match=r"scores: expected shape \(4,\), got \(2,\)"):
        search.update(torch.zeros(2))


def test_two_processes_end_with_the_weights_of_one(example, tmp_path) -> None:
    """Under torchrun only scores travel; the weights equal those of a run alone, bit for bit."""
    flags = (
        "--max-steps 2 --warmup-steps 3 --num-pairs 3 --num-prompts 4 --eval-size 4 --device cpu"
    )
    alone = [*flags.split(), "--output-dir", str(tmp_path / "one")]
    assert example.main(example.parsed(example.EvolutionConfig, alone, "")) == 0

    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 --local-ranks-filter 0"
    command = [sys.executable, *torchrun.split(), str(SCRIPT), *flags.split()]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes hold the same weights" in done.stdout
    assert "exchanged a step: 24 bytes of scores" in done.stdout
    weights = [tmp_path / name / "checkpoint" / "model.safetensors" for name in ("one", "two")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    files = [
        "checkpoint", "metrics.jsonl", "result.json", "reward.png", "samples.md", "settings.json"
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == files


def test_gsm8k_with_a_model_from_a_folder(example, tmp_path, model_folder) -> None:
    data = tmp_path / "train.jsonl"
    row = {"question": "What is 1 + 1?", "answer": "1+1=2\n#### 2"}
    data.write_text((json.dumps(row) + "\n") * 12)
    config = example.EvolutionConfig(
        task="gsm8k", data=str(data), eval_data=str(data), model=str(model_folder), device="cpu",
        dtype="bfloat16", warmup_steps=0, max_steps=1, num_pairs=1, num_prompts=2, eval_size=2,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert example.main(config) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 1 and result["config"]["sigma"] == config.sigma


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "gsm8k"}, "expected data .* and model"),
        ({"task": "gsm8k", "data": "x", "model": "y"}, "warmup_steps: no effect"),
        ({"data": "train.jsonl"}, "takes no data"),
        ({"sigma": 0.0}, "sigma: expected a positive number"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number >= 0"),
        ({"num_pairs": 0}, "num_pairs: expected at least 1"),
        ({"num_prompts": 0}, "num_prompts: expected at least 1, got 0"),
        ({"eval_size": 0}, "eval_size: expected at least 1"),
        ({"max_steps": -1}, "max_steps: expected at least 0, got -1"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_flags_are_named(example, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        example.EvolutionConfig(**fields)


def test_settings_that_cannot_work_are_one_line(example, tmp_path, capsys, monkeypatch) -> None:
    def refused(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["evolution.py", *flags])
        with pytest.raises(SystemExit) as ended:
            example.main(example.parse_flags())
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert refused("--sigma", "-1") == "error: sigma: expected a positive number, got -1.0\n"
    assert refused("--sigm", "x").startswith("error: ")
    assert refused("--model", str(tmp_path)).startswith("error: model: expected")
    (tmp_path / "settings.json").write_text("{}")
    error = f"error: output_dir: expected a folder without a run, got {tmp_path}\n"
    assert refused("--output-dir", str(tmp_path)) == error
