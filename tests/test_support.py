"""`Support`: how it is made, taken apart and checked."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fastgrpo
from fastgrpo import Support, support
from support_oracle import kept_masks

VOCAB = 57
IDS = torch.arange(15).view(3, 5)
SAMPLERS = {
    "top_k": dict(top_k=4),
    "top_k of ties": dict(top_k=3, ties=True),
    "more than there are": dict(top_k=100, top_p=0.9),
    "top_p": dict(top_p=0.8),
    "top_p of ties": dict(top_p=0.5, ties=True),
    "one": dict(top_p=1e-6),
    "min_p": dict(min_p=0.1),
    "all of them, warm": dict(top_k=20, top_p=0.9, min_p=0.03, temperature=1.7),
    "all of them, cold": dict(top_k=20, top_p=0.9, min_p=0.03, temperature=0.4),
}


def lists(made):
    """The kept ids of each token, ascending."""
    bounds = zip(made.cu[:-1].tolist(), made.cu[1:].tolist(), strict=True)
    return [sorted(made.ids[start:stop].tolist()) for start, stop in bounds]


def processors(**options):
    """Those that `generate` makes of these options, in its order."""
    config = GenerationConfig(do_sample=True, **{"top_k": None, **options})
    return GenerationMixin()._get_logits_processor(config)


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_what_logits_keep_is_what_transformers_keep(options, monkeypatch):
    options = dict(options)
    logits = 3 * torch.randn(3, 5, VOCAB, generator=torch.Generator().manual_seed(0))
    if options.pop("ties", False):
        logits = logits.round()
    taken = TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, TemperatureLogitsWarper
    chain = LogitsProcessorList(processors(**options))
    assert chain and all(isinstance(x, taken) for x in chain)
    wanted = chain(None, logits.flatten(0, 1)) > -torch.inf
    monkeypatch.setattr(support, "BLOCK", 4 * VOCAB)  # several blocks of rows
    made = Support.of_logits(logits, options.pop("temperature", 1.0), **options)
    assert made.shape == (3, 5) and (made.counts > 0).any()
    assert lists(made) == lists(Support.of_mask(wanted))


def test_a_temperature_for_each_token():
    logits = 3 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor([0.3, 1.0, 3.0, 0.7])
    made = Support.of_logits(logits, temperature, top_p=0.7)
    for i, t in enumerate(temperature.tolist()):
        assert lists(made)[i] == lists(Support.of_logits(logits[i : i + 1], t, top_p=0.7))[0]


def test_lists_and_masks_say_the_same():
    kept = kept_masks(IDS, VOCAB)
    of_mask = Support.of_mask(kept)
    named = [row.nonzero()[:, 0] for row in kept.flatten(0, 1)]
    of_lists = Support.of_lists(named, torch.ones(3, 5, dtype=torch.bool))
    assert of_mask.shape == of_lists.shape == (3, 5)
    # All of the vocabulary is stored as none of it.
    assert lists(of_mask) == [[] if len(x) == VOCAB else x for x in lists(of_lists)]
    assert of_mask.counts.flatten().tolist() == [len(x) for x in lists(of_mask)]


def test_lists_belong_to_the_tokens_of_a_mask():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    made = Support.of_lists([[3, 1], [], [2], (0, 5, 4)], mask)
    assert made.counts.tolist() == [[2, 0, 0], [0, 0, 0], [1, 0, 3]]
    assert lists(made) == [[1, 3], [], [], [], [], [], [2], [], [0, 4, 5]]
    assert Support.of_lists([]).shape == (0,) and Support.of_lists([[2], []]).shape == (2,)


def test_select_and_cat_are_those_of_tensors():
    kept = kept_masks(IDS, VOCAB)
    kept[kept.all(-1)] = False
    whole = Support.of_mask(kept)
    for rows, columns in (
        (slice(1, 3), slice(None)),
        (slice(None, None, 2), slice(1, 4)),
        (torch.tensor([2, 0, 2]), slice(2)),
        (torch.tensor([True, False, True]), slice(None)),
        (slice(0), slice(None)),
    ):
        some, wanted = whole.select(rows, columns), kept[rows][:, columns]
        assert some.shape == wanted.shape[:-1]
        assert lists(some) == lists(Support.of_mask(wanted))
    parts = [whole.select(slice(0, 1)), whole.select(slice(1, 3))]
    assert lists(Support.cat(parts)) == lists(whole) and Support.cat(parts).shape == (3, 5)
    flat = whole.view(15)
    assert flat.shape == (15,) and lists(flat.select(slice(3, 9))) == lists(whole)[3:9]


def test_devices_and_pytrees():
    whole = Support.of_mask(kept_masks(IDS, VOCAB))
    assert whole.to("cpu") is whole and whole.to("meta").ids.device.type == "meta"
    assert whole.to("meta").shape == (3, 5)
    twice = pytree.tree_map(lambda x: x.clone(), {"support": whole})["support"]
    assert isinstance(twice, Support) and lists(twice) == lists(whole) and twice.shape == (3, 5)
    with pytest.raises(AttributeError):
        whole.ids = whole.cu


BOUNDS = torch.tensor([0, 2, 3])
BAD = {
    "ids: expected a tensor": lambda: Support([1, 2], BOUNDS),
    "ids: expected dtype int64 or int32": lambda: Support(torch.ones(3), BOUNDS),
    r"ids: expected shape \(M,\)": lambda: Support(IDS, BOUNDS),
    r"cu: expected shape \(N \+ 1,\)": lambda: Support(torch.arange(3), BOUNDS[:0]),
    "cu: expected a non-decreasing sequence from 0 to M = 4": lambda: Support(
        torch.arange(4), BOUNDS
    ),
    "cu: expected a non-decreasing": lambda: Support(torch.arange(3), torch.tensor([0, 4, 3])),
    "shape: expected a tuple of ints, got 2": lambda: Support(torch.arange(3), BOUNDS, 2),
    r"shape: expected a tuple of ints, got \(2.0,\)": lambda: Support(
        torch.arange(3), BOUNDS, (2.0,)
    ),
    r"shape: expected one of 2 tokens .* got \(3, 1\)": lambda: Support(
        torch.arange(3), BOUNDS, (3, 1)
    ),
    r"shape: expected one of 2 tokens, got \(3,\)": lambda: Support(torch.arange(3), BOUNDS).view(
        3
    ),
    "ids: expected numbers >= 0, got -1": lambda: Support(torch.tensor([1, -1, 2]), BOUNDS),
    "ids: expected distinct ids .* got 7 twice in token 1": lambda: Support(
        torch.tensor([7, 3, 7, 8, 7]), torch.tensor([0, 2, 5])
    ),
    "lists: expected one for each of the 2 True tokens": lambda: Support.of_lists(
        [[1]], torch.ones(2, dtype=torch.bool)
    ),
    "lists: expected a list of ints": lambda: Support.of_lists([[0.5]]),
    "lists: expected a list of ints for each token: .*NoneType": lambda: Support.of_lists(
        [[1], None]
    ),
    "mask: expected dtype bool": lambda: Support.of_mask(IDS),
    r"mask: expected shape \(\.\.\., V\)": lambda: Support.of_mask(torch.ones(3).bool()),
    "top_k: expected one of top_k, top_p and min_p": lambda: Support.of_logits(torch.ones(2, 3)),
    "top_k: expected an int >= 1, got 0": lambda: Support.of_logits(torch.ones(2, 3), top_k=0),
    "top_p: expected a share": lambda: Support.of_logits(torch.ones(2, 3), top_p=0.0),
    "min_p: expected a finite number": lambda: Support.of_logits(torch.ones(2, 3), min_p=1.5),
    "temperature: expected a number > 0": lambda: Support.of_logits(torch.ones(2, 3), 0, top_k=1),
    "logits: expected dtype": lambda: Support.of_logits(IDS, top_k=1),
    "top_k: expected an int >= 1, got True": lambda: Support.of_logits(IDS.float(), top_k=True),
    "temperature: expected values > 0 at unmasked tokens, got -1.0": lambda: Support.of_logits(
        torch.ones(2, 3), torch.tensor([1.0, -1.0]), top_p=0.5
    ),
    "logits: expected no NaN": lambda: Support.of_logits(
        torch.tensor([[0.0, torch.nan, 1.0]]), top_p=0.5
    ),
    r"logits: expected no NaN and no \+inf": lambda: Support.of_logits(
        torch.tensor([[0.0, torch.inf, 1.0]]), min_p=0.5
    ),
    "a finite one for each token": lambda: Support.of_logits(
        torch.full((1, 3), -torch.inf), top_k=1
    ),
    "mask: expected a tensor": lambda: Support.of_lists([[1]], [[True]]),
    "with a least step of -1": lambda: Support(torch.arange(3), torch.tensor([0, 2, 1, 3])),
    r"got \(-2, -3\)": lambda: Support.of_lists([[1]] * 6).view(-2, -3),
    "supports: expected shapes that differ in dim 0 alone": lambda: Support.cat(
        [Support.of_mask(torch.eye(4).bool()), Support.of_mask(torch.eye(4).bool()[None])]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_values_on_a_gpu_are_looked_at_where_asked(monkeypatch):
    """The same ids that are refused are taken where the host would have to wait."""
    monkeypatch.setattr(fastgrpo.checks, "looks_at_values", lambda x: False)
    assert Support(torch.tensor([7, 3, 7, 8, 7]), torch.tensor([0, 2, 5])).shape == (2,)
