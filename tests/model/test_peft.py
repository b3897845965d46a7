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


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.1}])
def test_adapters_on_the_head_are_refused_by_name(options):
    model = adapted(target_modules=["q_proj", "lm_head"], **options)
    for construct in (FusedLM, head_of):
        with pytest.raises(UnsupportedHeadError, match="lm_head: expected a plain layer"):
            construct(model)


def test_an_adapter_on_the_embedding_of_a_tied_head_is_refused():
    model = adapted("llama", target_modules=["embed_tokens"])
    with pytest.raises(UnsupportedHeadError):
        FusedLM(model)


def test_prompt_learning_is_refused():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedHeadError, match="no prompt learning"):
        FusedLM(peft.get_peft_model(tiny("qwen2"), config))
