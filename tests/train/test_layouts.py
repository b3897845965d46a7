"""Prompts forwarded once, packed and padded: the same states, losses and gradients."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import PreTrainedModel

import fastgrpo
from fastgrpo.testing import LargestTensor
from fastgrpo.train import attention, layouts, packed_row
from fastgrpo.train.attention import NAME, UnsupportedAttentionError
from fastgrpo.train.completions import Rollout
from fastgrpo.train.layouts import LAYOUTS, choose_layout
from fastgrpo.train.load import _recompute_activations
from fastgrpo.train.packed_row import Call, Packing, Prefix, Span, length
from model_families import tiny

from .conftest import own_logps

# A window that is shorter than every sequence but one.
SLIDING = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "qwen2": {},
    "llama": {},
    "gemma3": SLIDING,
    "gpt2": {},
    "phi": {},
}


def model_of(family: str, **fields) -> PreTrainedModel:
    model = tiny(family, **FAMILIES.get(family, {}) | fields)
    model.set_attn_implementation("sdpa")
    return model


def rollout_of(groups: list[tuple[int, list[int]]]) -> Rollout:
    """Random completions, given the length of each prompt and of its completions."""
    generator = torch.Generator().manual_seed(0)
    lengths = [n for _, completions in groups for n in completions]
    return Rollout(
        prompts=tuple(torch.randint(3, 67, (n,), generator=generator) for n, _ in groups),
        prompt_index=torch.tensor([i for i, (_, c) in enumerate(groups) for _ in c]),
        token_ids=torch.randint(3, 67, (sum(lengths),), generator=generator),
        lengths=torch.tensor(lengths),
        finished=torch.ones(len(lengths), dtype=torch.bool),
    )


@pytest.fixture
def rollout() -> Rollout:
    """Prompts of different lengths, completions of one token, a group of one."""
    return rollout_of([(6, [4, 1, 7]), (1, [3, 1]), (9, [5]), (4, [1])])


@pytest.fixture(params=[128, 8], ids=["one call", "several calls"])
def few(monkeypatch, request) -> int:
    """Tokens of a call of sdpa: all of the rollout's, or not even those of a group."""
    monkeypatch.setattr(packed_row, "FEW", request.param)
    return request.param


@pytest.fixture
def in_float64(monkeypatch) -> None:
    """No float64 number becomes a float32 one, as the norms of many models make of it."""
    to = torch.Tensor.to

    def keep(x: Tensor, *args, **kwargs) -> Tensor:
        narrows = x.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values())
        return x if narrows else to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def logps_by(name: str, model: PreTrainedModel, rollout: Rollout) -> Tensor:
    head = fastgrpo.head_of(model)
    hidden = LAYOUTS[name].hidden(model, rollout)
    return fastgrpo.linear_logps(
        hidden, head.weight, rollout.token_ids, backend="torch", **head.options()
    ).logps


def loss_and_gradient(model: nn.Module, logps: Tensor) -> tuple[Tensor, Tensor]:
    """A weighted sum of log-probs, and its gradient in all trained parameters."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(len(logps), generator=generator, dtype=torch.float64)
    loss = (weights.to(logps.dtype) * logps).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, trained, allow_unused=True)
    flat = [g.flatten() for g in grads if g is not None]
    return loss.detach(), torch.cat(flat).double()


def relative(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_three_layouts_give_the_models_own_losses_and_gradients(
    in_float64, few: int, family: str, rollout
) -> None:
    model = model_of(family).double()
    logps = own_logps(model, rollout)
    loss, gradient = loss_and_gradient(model, logps)
    layout, why = choose_layout(model)
    assert layout.name == "shared", why
    for name in LAYOUTS:
        found = logps_by(name, model, rollout)
        torch.testing.assert_close(found, logps, atol=1e-10, rtol=0, check_dtype=False)
        found_loss, found_gradient = loss_and_gradient(model, found)
        assert relative(found_loss, loss) < 1e-10
        assert relative(found_gradient, gradient) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_layout_rounds_as_the_padded_one_does(family: str, dtype, rollout) -> None:
    exact = model_of(family).to(dtype).double()
    expected = loss_and_gradient(exact, own_logps(exact, rollout))[1]
    model = model_of(family).to(dtype)
    layout, why = choose_layout(model)
    assert layout.name == "shared", why
    error = {
        name: relative(loss_and_gradient(model, logps_by(name, model, rollout))[1], expected)
        for name in LAYOUTS
    }
    limit = {torch.float32: 1e-5}.get(dtype, 1.5 * error["padded"])
    assert max(error.values()) < limit, error


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt2"])
def test_adapters_and_recomputed_activations_get_the_same_gradients(
    in_float64, few: int, family: str, checkpointing: bool, rollout
) -> None:
    model = model_of(family)
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model = model.double().eval()
    gradient = loss_and_gradient(model, own_logps(model, rollout))[1]
    if checkpointing:
        _recompute_activations(model)
        model.enable_input_require_grads()
    assert choose_layout(model)[0].name == "shared"
    for name in LAYOUTS:
        found = loss_and_gradient(model, logps_by(name, model, rollout))[1]
        assert relative(found, gradient) < 1e-10


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "its attention is 'eager', not 'sdpa'"),
        ("gpt-oss", "its attention is 'eager', not 'sdpa'"),
        ("llama4-text", "layers of kind chunked_attention"),
        ("granite-moe-hybrid", "layers of kind linear_attention"),
        ("falcon-h1", "layers of kind hybrid"),
    ],
)
def test_what_has_no_exact_form_is_padded_and_says_so(family: str, reason: str, rollout) -> None:
    model = tiny(family)
    if "eager" not in reason:
        model.set_attn_implementation("sdpa")
    own = model.config._attn_implementation
    layout, why = choose_layout(model)
    assert layout.name == "padded" and reason in why
    assert model.config._attn_implementation == own
    logps = own_logps(model, rollout)
    torch.testing.assert_close(logps_by("padded", model, rollout), logps, atol=2e-5, rtol=0)


def test_a_completion_that_sees_another_is_found_out(monkeypatch) -> None:
    """Then completions are packed; where these see each other too, they are padded."""
    model = model_of("qwen2")

    def causal(call: Call, window: int | None) -> Tensor:
        queries, before = length(call.own), length(call.prefix)
        return torch.ones(queries, before + queries, dtype=torch.bool).tril(before)

    monkeypatch.setattr(
        Packing,
        "spans",
        lambda self, spans=Packing.spans: (
            Span(own, slice(0, own.start) if length(prefix) else prefix)
            for own, prefix in spans(self)
        ),
    )
    layout, why = choose_layout(model)
    assert layout.name == "packed" and "shared: hidden states differ by" in why
    monkeypatch.setattr(Call, "mask", causal)
    layout, why = choose_layout(model)
    assert layout.name == "padded" and "packed: hidden states differ by" in why
    assert model.config._attn_implementation == "sdpa"


def test_a_window_that_a_layer_keeps_to_itself_is_found_out() -> None:
    model = model_of("gemma3", sliding_window=512)
    assert choose_layout(model)[0].name == "shared"
    model = model_of("gemma3", sliding_window=512)
    model.model.layers[0].self_attn.sliding_window = None
    layout, why = choose_layout(model)
    assert layout.name == "padded" and "do not say which of them have a sliding window" in why


def test_a_model_that_takes_no_arguments_of_others_is_padded(monkeypatch) -> None:
    model = model_of("qwen2")
    backbone = type(model.model)
    monkeypatch.setattr(
        backbone,
        "forward",
        lambda self, input_ids, attention_mask=None, position_ids=None, use_cache=None: None,
    )
    layout, why = choose_layout(model)
    assert layout.name == "padded" and "Error" in why
    assert model.config._attn_implementation == "sdpa"


def test_other_forwards_are_those_of_sdpa() -> None:
    """Among them a padded batch, and decoding with a cache."""
    model = model_of("gemma3").double()
    ids = torch.randint(3, 67, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    plain = copy.deepcopy(model)
    assert choose_layout(model)[0].name == "shared"
    assert model.config._attn_implementation == NAME
    with torch.no_grad():
        outputs = [m(input_ids=ids, attention_mask=mask).logits[:, -1] for m in (model, plain)]
        assert torch.equal(*outputs)
        greedy = dict(attention_mask=mask, max_new_tokens=5, do_sample=False)
        assert torch.equal(*(m.generate(ids, **greedy) for m in (model, plain)))
    assert "attn_implementation" not in model.config.to_json_string()


@pytest.mark.parametrize("name", ["shared", "packed"])
def test_no_mask_of_all_tokens_by_all_tokens(name: str) -> None:
    model = model_of("gemma3", max_position_embeddings=512)
    assert choose_layout(model)[0].name == "shared"
    rollout = rollout_of([(4, [3] * 4)] * 64)
    tokens = LAYOUTS[name].tokens([(4, [3] * 4)] * 64)
    with LargestTensor() as seen, torch.no_grad():
        LAYOUTS[name].hidden(model, rollout)
    assert seen.bytes < tokens**2


def test_short_sequences_share_calls(monkeypatch) -> None:
    """As many as have FEW tokens: a call for each would take longer than what it computes."""
    model = model_of("qwen2")
    assert choose_layout(model)[0].name == "shared"
    sizes, sdpa = [], attention.scaled_dot_product_attention

    def counted(query: Tensor, key: Tensor, *args, **kwargs) -> Tensor:
        sizes.append((query.shape[2], key.shape[2]))
        return sdpa(query, key, *args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    groups = [(6, [5] * 8), (100, [41] * 4), (6, [5] * 8)]
    with torch.no_grad():
        LAYOUTS["shared"].hidden(model, rollout_of(groups))
    per_layer = [(38, 38), (100, 100), (120, 220), (40, 140), (38, 38)]
    assert sizes == per_layer * model.config.num_hidden_layers


def test_a_prefix_is_kept_once_for_the_backward() -> None:
    """Its completions have copies of its keys and values while they are computed."""
    packing = Packing((Prefix(100, (90,) * 6),), torch.device("cpu"))
    query, key, value = torch.randn(3, 1, 2, 640, 8).requires_grad_()
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attention.attention(nn.Module(), query, key, value, None, packing=packing)
    assert sum(kept.values()) <= 3 * query.numel() * query.element_size()


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 30.0},
        {"s_aux": torch.zeros(2)},
        {"position_bias": torch.zeros(1)},
        {"is_causal": False},
        {"dropout": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_attention_beyond_a_causal_mask_is_refused(options: dict) -> None:
    x = torch.randn(1, 2, 5, 4)
    packing = Packing((Prefix(2, (3,)),), x.device)
    attention.attention(nn.Module(), x, x, x, None, packing=packing)
    with pytest.raises(UnsupportedAttentionError, match=next(iter(options))):
        attention.attention(nn.Module(), x, x, x, None, packing=packing, **options)


@pytest.mark.parametrize("window", [None, 3])
def test_bounds_for_kernels_say_the_same_as_spans(monkeypatch, few, window: int | None) -> None:
    """By a stand-in for the CUDA kernel that aligns queries with the last keys."""
    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*args, **kwargs) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments
        query, key, value = (given[name] for name in ("query", "key", "value"))
        queries, keys = given["cu_seq_q"].tolist(), given["cu_seq_k"].tolist()
        left, right = given["window_size"]
        assert right == 0 and given["max_q"] == max(np.diff(queries))
        out = torch.zeros_like(query)
        for i in range(len(queries) - 1):
            mine, seen = slice(*queries[i : i + 2]), slice(*keys[i : i + 2])
            q, k, v = (x.transpose(0, 1) for x in (query[mine], key[seen], value[seen]))
            ahead = k.shape[1] - q.shape[1]
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(ahead)
            mask = mask if left < 0 else mask.triu(ahead - left)
            scores = (q @ k.transpose(1, 2) * given["scale"]).masked_fill(~mask, -torch.inf)
            out[mine] = (scores.softmax(-1) @ v).transpose(0, 1)
        return out

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    packing = Packing((Prefix(4, (3, 0, 2)), Prefix(1), Prefix(5, (1,))), torch.device("cpu"))
    query = torch.randn(1, 4, 16, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 16, 8, dtype=torch.float64)
    out, _ = attention.attention(
        nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, packing=packing
    )
    by_kernel = attention._varlen(query, key, value, 0.3, window, packing.varlen)
    torch.testing.assert_close(by_kernel, out[0], atol=1e-12, rtol=0)


def test_hidden_states_that_are_not_finite_are_no_agreement() -> None:
    x = torch.ones(2, 3)
    assert layouts._distance(x * torch.nan, x) == float("inf")
