"""Sampling with top-p, top-k or min-p: what was kept is recorded, and is what is trained on."""

from __future__ import annotations

import dataclasses
import json
import math

import peft
import pytest
import torch

from fastgrpo import Support
from fastgrpo.testing import LargestTensor
from fastgrpo.train import sampler as sampler_module
from fastgrpo.train.completions import Rollout, concatenate
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.layouts import LAYOUTS
from fastgrpo.train.model import Policy
from fastgrpo.train.optimizer import MasterAdamW
from fastgrpo.train.rollout import encode
from fastgrpo.train.sampler import ModelSampler
from fastgrpo.train.sampling import Sampling

from .conftest import TINY_RUN, own_logits, own_logps, policy_in, read_metrics

FILTERS = {
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 4},
    "min_p": {"min_p": 0.4},
    "all": {"top_k": 9, "top_p": 0.8, "min_p": 0.1},
}


def sampled(policy: Policy, **filters: float) -> Rollout:
    """Twelve completions with advantages, drawn at temperature 1.3."""
    prompts = encode(policy, ["1+2=", "34+56=", "7+10="])
    rollout = ModelSampler(policy).sample(prompts, 4, Sampling(8, 1.3, **filters))
    generator = torch.Generator().manual_seed(1)
    return dataclasses.replace(rollout, advantages=torch.randn(12, generator=generator))


def kept(support: Support) -> list[list[int]]:
    return [sorted(ids.tolist()) for ids in support.ids.split(support.cu.diff().tolist())]


@pytest.mark.parametrize("by_generate", [False, True], ids=["own cache", "generate"])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_recorded_is_what_transformers_keep(policy, monkeypatch, filters, by_generate) -> None:
    if by_generate:
        monkeypatch.setattr(sampler_module, "can_prefill", lambda model: False)
    rollout = sampled(policy, **filters)
    assert len(rollout.lengths.unique()) > 1
    logits = own_logits(policy.model, rollout)
    assert kept(rollout.support) == kept(Support.of_logits(logits, 1.3, **filters))
    expected = own_logps(policy.model, rollout, 1.3)
    torch.testing.assert_close(rollout.sampler_logps, expected, atol=2e-5, rtol=0)


def test_without_a_filter_nothing_is_recorded(policy) -> None:
    """And what keeps everything is as if it were not there."""
    assert sampled(policy).support is None
    everything = sampled(policy, top_k=14)
    assert torch.equal(everything.token_ids, sampled(policy).token_ids)
    assert not everything.support.counts.any()


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_ratio_to_the_sampler_is_1_with_the_support_alone(
    script, policy, config, layout, adapter: bool
) -> None:
    """Nothing has been learnt. Scored over the whole vocabulary, tokens are less likely."""
    policy = dataclasses.replace(policy, layout=layout)
    if adapter:
        policy.model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    small = {"temperature": 1.3, "beta": 0.0, "max_tokens_per_microbatch": 50}
    config, rollout = dataclasses.replace(config, **small), sampled(policy, top_p=0.9)
    ratios = {}
    for name, support in (("support", rollout.support), ("full", None)):
        batch = dataclasses.replace(rollout, old_logps=rollout.sampler_logps, support=support)
        optimizer = MasterAdamW(policy.model.parameters(), 0.0, 10**6)
        _, ratios[name] = script.update(policy, optimizer, batch, config)
    for bound in ("ratio_min", "ratio_max"):
        assert abs(math.log(ratios["support"][bound])) <= 1e-4
    # The mean of the logarithms is further from 0 than the logarithm of the mean.
    assert math.log(ratios["full"]["ratio_mean"]) < -1e-2


def test_every_pass_of_a_run_takes_the_support(script, tmp_path, monkeypatch) -> None:
    """The policy's, the reference's, that of later updates, and after flat groups made way."""
    seen: list[Sampling] = []

    class Watched(ModelSampler):
        def sample(self, prompts, num_generations, sampling):
            seen.append(sampling)
            return super().sample(prompts, num_generations, sampling)

    monkeypatch.setattr(script, "ModelSampler", Watched)
    filters = {"top_k": 10, "top_p": 0.9, "min_p": 0.01}
    config = TrainConfig(
        **TINY_RUN, **filters, temperature=0.8, beta=0.1, num_iterations=2, resample_flat_groups=2,
        output_dir=str(tmp_path),
    )  # fmt: skip
    assert script.main(config) == 0
    for sampling in seen:
        asked = {name: getattr(sampling, name) for name in filters}
        assert asked == filters if sampling.temperature else not sampling.filters
    rows = read_metrics(tmp_path)
    assert len(rows) == 3 and sum(row["groups_resampled"] for row in rows) > 0
    assert all(row["sampler_gap_max"] <= 1e-4 for row in rows)
    assert rows[0]["kl"] <= 1e-4  # the policy has hardly left the reference


def test_a_part_of_a_rollout_keeps_its_support(policy) -> None:
    rollout = sampled(policy, min_p=0.4)
    wanted = kept(rollout.support)
    starts = rollout.cu_seqlens.tolist()
    chosen = torch.tensor([1, 4, 5, 10])
    tokens = [t for i in chosen.tolist() for t in range(starts[i], starts[i + 1])]
    assert kept(rollout[chosen].support) == [wanted[t] for t in tokens]
    groups = [rollout[torch.arange(start, start + 4)] for start in (0, 4, 8)]
    assert kept(concatenate(groups).support) == wanted
    groups[1] = dataclasses.replace(groups[1], support=None)
    mixed = kept(concatenate(groups).support)
    middle = slice(starts[4], starts[8])
    assert mixed == [*wanted[: starts[4]], *[[]] * len(wanted[middle]), *wanted[starts[8] :]]
    assert concatenate(groups[1:2]).support is None


def test_no_mask_of_more_than_a_step_is_held(model_folder) -> None:
    policy = policy_in(model_folder)
    prompts = [torch.tensor([5, 6, 7])]
    sampler, sampling = ModelSampler(policy), Sampling(60, top_k=2)
    sampler.sample(prompts, 1, sampling)
    with LargestTensor() as seen:
        rollout = sampler.sample(prompts, 8, sampling)
    assert seen.bytes < len(rollout.token_ids) * policy.model.config.vocab_size / 2


@pytest.mark.slow
def test_the_embedded_task_is_learnt(script, tmp_path) -> None:
    config = TrainConfig(
        device="cpu", backend="torch", top_p=0.9, max_steps=60, output_dir=str(tmp_path)
    )
    assert script.main(config) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accuracy_after"] > result["accuracy_before"] + 0.2
    assert all(row["sampler_gap_max"] <= 1e-4 for row in read_metrics(tmp_path))


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"top_k": -1}, "top_k: expected an int >= 0, got -1"),
        ({"top_p": 0.0}, r"top_p: expected a share in \(0, 1\], got 0.0"),
        ({"top_p": math.nan}, "top_p: expected a finite number, got nan"),
        ({"min_p": 1.5}, r"min_p: expected a finite number in \[0.0, 1.0\], got 1.5"),
    ],
    ids=str,
)
def test_wrong_filters_are_named(filters, message: str) -> None:
    for settings in (lambda: Sampling(3, **filters), lambda: TrainConfig(**filters)):
        with pytest.raises(ValueError, match=message):
            settings()


def test_filters_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature: expected above 0 with top_k, top_p or"):
        Sampling(3, temperature=0.0, min_p=0.1)
    with pytest.raises(ValueError, match="sparsity: expected 0 with top_p, .* got 0.01"):
        TrainConfig(top_p=0.9, sparsity=0.01)
