"""FusedLM around a model with adapters of PEFT: log-probs and gradients of the model itself."""

from __future__ import annotations

import pytest
import torch

from fastgrpo import FusedLM, UnsupportedHeadError, head_of
from model_families import VOCAB, tiny

peft = pytest.importorskip("peft")

IDS = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
LOSS_MASK = (torch.arange(8) > 2).expand(2, 8)
ADVANTAGES = torch.tensor([1.0, -1.0])


def adapted(family="qwen2", **options):
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4, **options}
    model = peft.get_peft_model(tiny(family), peft.LoraConfig(init_lora_weights=False, **options))
    return model.eval()


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_as_its_logits(model):
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    (-(ADVANTAGES[:, None] * logps) * LOSS_MASK[:, 1:]).sum().div(LOSS_MASK.sum()).backward()
    wanted = gradients(model)
    out = FusedLM(model)(IDS, MASK, LOSS_MASK, ADVANTAGES, config="dapo")
    out.loss.backward()
    actual = gradients(model)
    assert ((out.logps[:, 1:] - logps) * LOSS_MASK[:, 1:]).abs().max() <= 2e-5
    assert actual.keys() == wanted.keys() and wanted
    for name, exact in wanted.items():
        assert (actual[name] - exact).norm() <= 1e-5 * exact.norm(), name
    return wanted


def test_a_frozen_head():
    names = assert_same_as_its_logits(adapted())
    assert all("lora" in name for name in names)


def test_a_head_that_is_saved_whole():
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    names = assert_same_as_its_logits(model)
    assert any("lm_head" in name for name in names)
    with model.disable_adapter():
        plain = FusedLM(model)(IDS, MASK, LOSS_MASK).logps
    trained = FusedLM(model)(IDS, MASK, LOSS_MASK).logps
    assert not torch.allclose(plain, trained), "the head in use is looked up at each call"


def test_adapters_that_come_later_are_found():
    model = tiny("qwen2")
    lm = FusedLM(model)
    before = lm(IDS, MASK, LOSS_MASK).logps
    lm.model = peft.get_peft_model(
        model, peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"], r=4)
    )
    assert not torch.allclose(before, lm(IDS, MASK, LOSS_MASK).logps)


def on_the_head(family="qwen2", **options):
    return adapted(family, target_modules=["q_proj", "lm_head"], **options)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2", "granite", "cohere"])
def test_lora_on_the_head(family):
    """Tied or not, with a softcap or a scale; W is frozen and gets no gradient."""
    names = assert_same_as_its_logits(on_the_head(family))
    assert sum("lm_head" in name for name in names) == 2
    assert all("lora" in name for name in names)


def test_lora_on_the_head_that_is_rank_stabilised():
    model = on_the_head(use_rslora=True, lora_alpha=16)
    assert model.get_output_embeddings().scaling["default"] == 8
    assert_same_as_its_logits(model)


def test_several_active_adapters_on_the_head():
    model = on_the_head()
    model.add_adapter("other", peft.LoraConfig(
        init_lora_weights=False, target_modules=["lm_head"], r=3, lora_alpha=5
    ))  # fmt: skip
    model.base_model.set_adapter(["default", "other"])
    names = assert_same_as_its_logits(model)
    assert sum("lm_head" in name for name in names) == 4
    model.base_model.set_adapter("other")
    names = assert_same_as_its_logits(model)
    assert sum("lm_head" in name for name in names) == 2


def test_lora_on_the_head_switched_off_and_merged():
    model = on_the_head()
    lm = FusedLM(model)
    active = lm(IDS, MASK, LOSS_MASK).logps
    with model.disable_adapter():
        plain = FusedLM(model)(IDS, MASK, LOSS_MASK).logps
    assert (active - plain).abs().max() > 0.01
    model.merge_adapter()
    assert model.get_output_embeddings().merged
    assert (lm(IDS, MASK, LOSS_MASK).logps - active).abs().max() < 1e-5
    assert head_of(model).lora is None
    with model.disable_adapter():
        unmerged = lm(IDS, MASK, LOSS_MASK).logps
    assert (unmerged - plain).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, "expected plain LoRA, got DoraLinearVariant"),
        ({"lora_dropout": 0.1}, "expected lora_dropout=0, got 0.1"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(options, name):
    model = on_the_head(**options)
    for construct in (FusedLM, head_of):
        with pytest.raises(UnsupportedHeadError, match=f"lm_head: {name}"):
            construct(model)


OTHERS = {
    "ia3.layer.Linear": lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "adalora.layer.SVDLinear": lambda: peft.AdaLoraConfig(target_modules=["lm_head"], total_step=9),
    "loha.layer.Linear": lambda: peft.LoHaConfig(target_modules=["lm_head"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_adapter_on_the_head_is_refused_by_name(name):
    message = f"lm_head: expected a plain layer or LoRA on it, got peft.tuners.{name}"
    with pytest.raises(UnsupportedHeadError, match=message):
        FusedLM(peft.get_peft_model(tiny("qwen2"), OTHERS[name]()))


def test_mixed_adapters_are_refused_by_name():
    config = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(UnsupportedHeadError, match="expected a PeftModel, got PeftMixedModel"):
        FusedLM(peft.get_peft_model(tiny("qwen2"), config, mixed=True))


def test_a_trained_weight_under_lora_is_refused_by_name():
    model = on_the_head()
    model.get_output_embeddings().base_layer.weight.requires_grad_()
    with pytest.raises(UnsupportedHeadError, match="lm_head: expected a frozen weight under LoRA"):
        FusedLM(model)


def test_trained_tokens_under_lora_are_refused_by_name():
    model = adapted(
        "llama", target_modules=["q_proj", "lm_head"],
        trainable_token_indices={"embed_tokens": [1, 5]},
    )  # fmt: skip
    with pytest.raises(UnsupportedHeadError, match="expected no trainable_token_indices"):
        FusedLM(model)


def test_factors_of_lora_are_not_handed_out():
    """They would be of before the next step."""
    with pytest.raises(UnsupportedHeadError, match="lm_head: expected no LoRA on it"):
        head_of(on_the_head())


def test_an_adapter_that_is_switched_off_is_not_looked_at():
    model = on_the_head(lora_dropout=0.5)
    with model.disable_adapter():
        assert head_of(model).lora is None


def test_adapters_of_16_bits_on_a_model_of_32():
    model = adapted(target_modules=["lm_head"])
    layer = model.get_output_embeddings()
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        factor.weight.data = factor.weight.data.bfloat16()
    logps = FusedLM(model, check=False)(IDS, MASK, LOSS_MASK).logps
    a, b = (x["default"].weight.double() for x in (layer.lora_A, layer.lora_B))
    base = model.get_base_model()
    hidden = base.base_model(IDS, use_cache=False).last_hidden_state.double()
    z = hidden @ (layer.base_layer.weight.double() + layer.scaling["default"] * b @ a).t()
    wanted = z[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    assert ((logps[:, 1:] - wanted) * LOSS_MASK[:, 1:]).abs().max() <= 2e-5


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_trainable_tokens_of_the_head_are_refused(family):
    model = adapted(family, trainable_token_indices={"lm_head": [1, 2]})
    with pytest.raises(UnsupportedHeadError, match="expected no trainable_token_indices"):
        FusedLM(model)


def test_adapters_per_sample_are_refused():
    with pytest.raises(ValueError, match="adapter_names: expected none"):
        FusedLM(on_the_head())(IDS, MASK, LOSS_MASK, adapter_names=["default", "__base__"])


def test_an_adapter_on_the_embedding_of_a_tied_head_is_refused():
    model = adapted("llama", target_modules=["embed_tokens"])
    with pytest.raises(UnsupportedHeadError):
        FusedLM(model)


def test_prompt_learning_is_refused():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedHeadError, match="no prompt learning"):
        FusedLM(peft.get_peft_model(tiny("qwen2"), config))
