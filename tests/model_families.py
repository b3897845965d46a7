"""Tiny models of many families, with random weights and a head that is not tied to zero."""

from __future__ import annotations

import torch
import transformers
from torch import nn

VOCAB = 67
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
# Name -> (config class, fields beside SMALL).
FAMILIES = {
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=8)),
    "qwen3-moe": ("Qwen3MoeConfig", dict(head_dim=8, **MOE)),
    "llama": ("LlamaConfig", dict(tie_word_embeddings=True)),
    "llama4-text": (
        "Llama4TextConfig", dict(head_dim=8, num_local_experts=2, intermediate_size_mlp=48)
    ),
    "mistral": ("MistralConfig", dict(head_dim=8)),
    "gemma2": ("Gemma2Config", dict(head_dim=8, final_logit_softcapping=5.0)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=8)),
    "cohere": ("CohereConfig", dict(logit_scale=0.25)),
    "granite": ("GraniteConfig", dict(logits_scaling=4.0)),
    "granite-moe-hybrid": (
        "GraniteMoeHybridConfig",
        dict(logits_scaling=4.0, num_local_experts=4, num_experts_per_tok=2,
             shared_intermediate_size=24,
             layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
             mamba_n_groups=1, position_embedding_type="rope"),
    ),
    "falcon-h1": (
        "FalconH1Config",
        dict(lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
             mamba_d_state=8, mamba_n_groups=1),
    ),
    "phi": ("PhiConfig", {}),
    "minicpm3": (
        "MiniCPM3Config",
        dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
             qk_rope_head_dim=8, v_head_dim=8, dim_model_base=16),
    ),
    "olmo2": ("Olmo2Config", {}),
    "gpt2": ("GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "gpt-oss": ("GptOssConfig", dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "deepseek-v3": (
        "DeepseekV3Config",
        dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
             qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
             topk_group=1, moe_intermediate_size=24, first_k_dense_replace=1),
    ),
}  # fmt: skip


def tiny(family: str, **fields) -> nn.Module:
    """A model of a family, in evaluation mode, float32, with logits of a spread of about 2."""
    name, own = FAMILIES[family]
    config = getattr(transformers, name)(**{**SMALL, **own, **fields})
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        with torch.no_grad():
            head.weight.normal_(std=0.35)
            if head.bias is not None:
                head.bias.normal_()
    return model.eval()
