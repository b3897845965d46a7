"""Where a policy comes from: a folder, a GGUF file, a LoRA adapter; and what cannot be loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GemmaConfig, Qwen2Config

from fastgrpo.train import load
from fastgrpo.train.checkpoint import save_checkpoint
from fastgrpo.train.config import TrainConfig
from fastgrpo.train.load import load_policy, load_tokenizer
from fastgrpo.train.model import Policy
from fastgrpo.train.optimizer import MasterAdamW

from .conftest import policy_in


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(torch.arange(12)[None]).logits


def trained(policy: Policy) -> list[str]:
    return [name for name, p in policy.model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("targets", [[], ["q_proj", "v_proj"]], ids=["all-linear", "two"])
def test_an_adapter_learns_alone_and_comes_back(tmp_path, model_folder, targets) -> None:
    pytest.importorskip("peft")
    flags = {"lora_rank": 4, "lora_alpha": 8.0, "lora_target_modules": targets}
    policy, plain = policy_in(model_folder, **flags), policy_in(model_folder)
    names = trained(policy)
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert modules == (set(targets) or linear) and all(".lora_" in name for name in names)
    assert not policy.head.weight.requires_grad
    assert torch.equal(logits(policy), logits(plain))  # an adapter starts without effect

    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_checkpoint(policy, tmp_path / "checkpoint")
    files = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "model.safetensors" not in files
    saved = json.loads((tmp_path / "checkpoint" / "adapter_config.json").read_text())
    assert saved["r"] == 4 and saved["lora_alpha"] == 8

    again = policy_in(tmp_path / "checkpoint")
    assert not torch.equal(logits(again), logits(plain))
    torch.testing.assert_close(logits(again), logits(policy), atol=0, rtol=0)
    assert trained(again) == names
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    torch.testing.assert_close(alone(torch.arange(12)[None]).logits, logits(policy))
    policy.model.disable_adapters()
    assert torch.equal(logits(policy), logits(plain))


def test_an_unknown_target_names_those_there_are(model_folder) -> None:
    pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match="lora_target_modules: expected names among .*'q_proj'"
    ) as refused:
        policy_in(model_folder, lora_rank=2, lora_target_modules=["query"])
    assert "lm_head" not in str(refused.value)


def test_an_adapter_on_an_adapter_is_refused(tmp_path, model_folder) -> None:
    pytest.importorskip("peft")
    save_checkpoint(policy_in(model_folder, lora_rank=2), tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="lora_rank: .* is an adapter already"):
        policy_in(tmp_path / "checkpoint", lora_rank=2)


def with_head(folder: Path, model_folder: Path, tied: bool) -> Path:
    """The model and its tokenizer in another folder, its head tied to the embedding or not."""
    policy = policy_in(model_folder)
    policy.model.config.tie_word_embeddings = tied
    policy.model.tie_weights()
    save_checkpoint(policy, folder)
    return folder


def with_adapter(folder: Path, base: Path, **options) -> Path:
    """The folder of an adapter that has learnt something."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("tied", "targets", "name"),
    [
        (False, ["lm_head"], "lm_head"),
        (True, ["q_proj", "lm_head"], "lm_head"),
        (True, ["embed_tokens"], "model.embed_tokens"),
    ],
)
def test_a_flag_puts_no_adapter_on_the_head(tmp_path, model_folder, tied, targets, name) -> None:
    pytest.importorskip("peft")
    folder = with_head(tmp_path / "model", model_folder, tied)
    with pytest.raises(ValueError, match=f"lora_target_modules: .* alone, got one on {name}$"):
        policy_in(folder, lora_rank=2, lora_target_modules=targets)


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {"target_modules": ["lm_head", "q_proj"]}),
        (True, {"target_modules": ["lm_head"]}),
        (False, {"target_modules": ["lm_head"], "use_dora": True}),
        (True, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
    ],
    ids=["lora", "tied", "dora", "tokens"],
)
def test_an_adapter_that_acts_on_the_head_is_refused(tmp_path, model_folder, tied, options) -> None:
    base = with_head(tmp_path / "model", model_folder, tied)
    adapter = with_adapter(tmp_path / "adapter", base, **options)
    with pytest.raises(ValueError, match="model: expected an adapter .* got one on lm_head$"):
        policy_in(adapter)


def test_an_adapter_on_an_embedding_that_is_not_the_head_learns(model_folder) -> None:
    pytest.importorskip("peft")
    policy = policy_in(model_folder, lora_rank=2, lora_target_modules=["embed_tokens"])
    assert trained(policy) and all(".embed_tokens.lora_" in name for name in trained(policy))


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_copy_of_the_head_is_the_policys_head(tmp_path, model_folder, tied) -> None:
    base = with_head(tmp_path / "model", model_folder, tied)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    policy = policy_in(with_adapter(tmp_path / "adapter", base, **options))
    states = policy.model.base_model(torch.arange(12)[None]).last_hidden_state
    before, optimizer = logits(policy), MasterAdamW(policy.model.parameters(), 1e-2, 10)
    optimizer.backward((states @ policy.head.weight.t()).square().mean())
    optimizer.step(0.0, 1.0)
    states = policy.model.base_model(torch.arange(12)[None]).last_hidden_state
    after = logits(policy)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(states @ policy.head.weight.t(), after)
    save_checkpoint(policy, tmp_path / "checkpoint")
    torch.testing.assert_close(logits(policy_in(tmp_path / "checkpoint")), after)


@pytest.mark.parametrize("lora_rank", [0, 2], ids=["model", "adapter"])
def test_what_lacks_a_weight_is_refused(tmp_path, model_folder, lora_rank) -> None:
    """transformers draws it at random, and says so in its log."""
    if lora_rank:
        pytest.importorskip("peft")
    save_checkpoint(policy_in(model_folder, lora_rank=lora_rank), tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    weights = load_file(path)
    lost = next(name for name in weights if "layers.1.self_attn.q_proj" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model: expected all weights .*layers.1.self_attn.q_p"):
        policy_in(tmp_path)


def test_an_adapter_without_a_tokenizer_has_that_of_its_model(tmp_path, model_folder) -> None:
    pytest.importorskip("peft")
    save_checkpoint(policy_in(model_folder, lora_rank=2), tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint").iterdir():
        if not path.name.startswith("adapter"):
            path.unlink()
    again, plain = policy_in(tmp_path / "checkpoint"), policy_in(model_folder)
    assert again.tokenizer("a b")["input_ids"] == plain.tokenizer("a b")["input_ids"]
    assert again.end_ids == plain.end_ids
    path = tmp_path / "checkpoint" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="model: expected the name of its model in .*, got none"):
        policy_in(tmp_path / "checkpoint")


def test_triton_on_a_cpu_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match="backend: got 'triton', but .+"):
        load_policy(TrainConfig(device="cpu", backend="triton", model="nowhere"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(device: str) -> None:
    with pytest.raises(ValueError, match=f"device: got '{device}': .+") as refused:
        load_policy(TrainConfig(device=device))
    assert len(str(refused.value).splitlines()) == 1


def test_what_is_not_installed_is_named(monkeypatch, model_folder, tmp_path) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        load, "find_spec", lambda name: None if name in ("peft", "gguf") else known(name)
    )
    with pytest.raises(ValueError, match=r"needs the package peft, .* 'fastgrpo\[lora\]'"):
        policy_in(model_folder, lora_rank=2)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match=r"needs the package gguf, .* 'fastgrpo\[gguf\]'"):
        policy_in(tmp_path / "a.gguf")


def test_a_model_that_is_not_there_is_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match="model: expected a GGUF file, a folder") as refused:
        policy_in(tmp_path)
    assert "no config.json in this folder" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def resized(path: Path) -> None:
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"intermediate_size": 48}))


def adapter_alone(path: Path) -> None:
    """The settings of an adapter of this very model, without its weights."""
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    path.write_text(json.dumps(settings | {"base_model_name_or_path": str(path.parent / "base")}))
    shutil.copytree(path.parent, path.parent / "base", ignore=shutil.ignore_patterns(path.name))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", cut, "got '.*broken': Error while deserializing header"),
        ("model.safetensors", lambda p: p.write_text("version https://git-lfs"), "got '.*broken'"),
        ("tokenizer.json", cut, "got '.*broken': Unterminated string"),
        ("config.json", lambda p: p.write_text("[]"), "got '.*broken': .* must be a mapping"),
        ("config.json", resized, "got '.*broken': .*ignore_mismatched_sizes"),
        ("adapter_config.json", lambda p: p.write_text("{"), "its model in .*, got JSONDecodeErr"),
        ("adapter_config.json", lambda p: p.write_text("[]"), "its model in .*, got AttributeErr"),
        ("adapter_config.json", adapter_alone, "got '.*broken': .*No such file"),
    ],
    ids=["cut", "pointer", "tokenizer", "config", "sizes", "no JSON", "list", "no adapter"],
)
def test_a_folder_that_is_broken_is_one_line(tmp_path, model_folder, name, change, message) -> None:
    if name == "adapter_config.json":
        pytest.importorskip("peft")
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    change(folder / name)
    with pytest.raises(ValueError, match=f"^model: expected .*{message}") as refused:
        policy_in(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("config", [Qwen2Config, GemmaConfig], ids=["no ids", "an id for all"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, config) -> None:
    """Transformers makes one that reads every text as nothing, or as one unknown token."""
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model: expected a tokenizer in {tmp_path}, got none"):
        load_tokenizer(TrainConfig(model=str(tmp_path)))


def test_a_package_that_a_tokenizer_lacks_is_one_line(monkeypatch, model_folder) -> None:
    def fails(*args, **kwargs):
        raise ImportError("\nneeds the sentencepiece library\nwhich was not found")

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(ValueError, match="got .*: needs the sentencepiece library$"):
        policy_in(model_folder)


def test_a_gguf_file_is_dequantised_and_saved_as_an_ordinary_model(tmp_path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = write_gguf(gguf, tmp_path / "tiny.gguf")
    policy = policy_in(path)
    weight = policy.model.model.layers[0].mlp.down_proj.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.detach(), dequantised(gguf, path), atol=0, rtol=0)
    assert policy.tokenizer.decode(policy.tokenizer("ab")["input_ids"]) == "ab"
    save_checkpoint(policy, tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert "quantization_config" not in config
    assert torch.equal(logits(policy_in(tmp_path / "checkpoint")), logits(policy))


def dequantised(gguf, path: Path) -> torch.Tensor:
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def write_gguf(gguf, path: Path) -> Path:
    """Write a random Llama with one layer, its larger weights in 8 bits, and a byte tokenizer."""
    width, tokens = 32, ["<|end|>", *(chr(i) for i in range(33, 127)), "Ġ", "Ġa"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ a"])
    writer.add_token_types([3, *[1] * (len(tokens) - 1)])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.0.{name}.weight": (width, width) for name in matrices}
    shapes |= {"token_embd.weight": (len(tokens), width)}
    quantized = gguf.GGMLQuantizationType.Q8_0
    torch.manual_seed(0)
    for name, shape in shapes.items():
        values = gguf.quantize(torch.randn(shape).numpy(), quantized)
        writer.add_tensor(name, values, raw_dtype=quantized)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(width).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
