"""Tiny mixtures of experts, one of every kind of fused experts that transformers has."""

from __future__ import annotations

from typing import Any

import torch
from conftest import TINY, enlarge
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


EXPERTS = 4
SHARED = {**TINY, "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2}
ROUTED = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "first_k_dense_replace": 0,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 24, **ROUTED},
    "qwen3_moe": {"num_experts": EXPERTS, "head_dim": 8, **ROUTED},
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **DEEPSEEK,
        **ROUTED,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": {**DEEPSEEK, **ROUTED, "head_dim": 8},
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama4_text": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
    },
    "jamba": {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
}


def build_moe(family: str, **options: Any) -> PreTrainedModel:
    """A fresh tiny model of the family in eval mode, the same weights at every call; its experts differ and matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**SHARED, **FAMILIES[family], **options}), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3 or name.endswith("sinks") or ("experts" in name and name.endswith("bias")):
                parameter.normal_(std=0.15)
    return enlarge(model)
