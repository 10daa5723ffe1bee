"""The table of decoder families: one tiny model of each, built from its own configuration class.

Every row is a `model_type` of transformers with what its configuration needs to be small and to show what is special
about the family (grouped queries, soft-caps, sinks, sliding windows, experts, recurrent states). Nothing is downloaded.
The attention and experts implementations are those that `from_pretrained` gives by default.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


VOCABULARY = 300
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(
        (
            "dropout",
            "attention_dropout",
            "hidden_dropout",
            "activation_dropout",
            "attn_pdrop",
            "embd_pdrop",
            "resid_pdrop",
            "embed_dropout",
            "resid_dropout",
            "residual_dropout",
            "attention_probs_dropout_prob",
            "hidden_dropout_prob",
        ),
        0.0,
    ),
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
LATENT = {
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4}
WINDOWS = {"sliding_window": 4}


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: the family's `model_type`, with what distinguishes this row where one has several.
        options: configuration on top of `COMMON`.
        seed: of the random weights; routers choose with a margin under it.
        tolerance: relative error of logits and gradient that the tests allow; 1e-4 is what every family must keep.
        cached: whether generation with a cache is supported; a named refusal otherwise.
        replay: whether the family's blocks can be replayed.
        oracle: the attention of the float64 oracle; "sdpa" (its slow backend) where "eager" is another network.
        note: what a user should know, for the page of models.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    tolerance: float = 3e-5
    cached: bool = True
    replay: bool = True
    oracle: str = "eager"
    note: str = ""

    @property
    def model_type(self) -> str:
        """The name under which transformers knows the family."""
        return self.name.split(" ")[0]

    def build(self) -> PreTrainedModel:
        """A fresh tiny model in eval mode, the same weights at every call."""
        torch.manual_seed(self.seed)
        config = AutoConfig.for_model(self.model_type, **{**COMMON, **self.options})
        return enlarge(AutoModelForCausalLM.from_config(config))


def enlarge(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode with matrices of one size, and vectors (norms, biases, sinks, decays) off their start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "A_log" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "conv" not in name and "r_weight" not in name:
                parameter.mul_(0.15 / max(float(parameter.std()), 1e-3))
    return model.eval()


FAMILIES = [
    Family("llama"),
    Family("mistral", WINDOWS),
    Family("mixtral", EXPERTS),
    Family("qwen2"),
    Family("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    Family("qwen3", {"head_dim": 8}),
    Family("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    Family(
        "qwen3_next",
        {
            **EXPERTS,
            **GATED_DELTA,
            "head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
    ),
    Family(
        "qwen3_5_text",
        {**GATED_DELTA, "head_dim": 8, "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    ),
    Family("gemma", {"head_dim": 8}),
    Family("gemma2", {"head_dim": 8, **WINDOWS, "query_pre_attn_scalar": 8}),
    Family(
        "gemma3_text",
        {
            "head_dim": 8,
            **WINDOWS,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    Family("phi"),
    Family("phi3"),
    Family("gpt2", GPT2),
    Family(
        "gpt_neo",
        {
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1], [["local"], 1]],
            "window_size": 4,
        },
    ),
    Family("gptj", {**GPT2, "rotary_dim": 4}),
    Family("gpt_neox"),
    Family("gpt_bigcode", GPT2),
    Family("gpt_oss", {**EXPERTS, "head_dim": 8, **WINDOWS}),
    Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("bloom", {"n_layer": 3, "n_head": 4}),
    Family("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Family(
        "falcon alibi",
        {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
        oracle="sdpa",
        note="its 'eager' attention adds ALiBi twice, a bug of the host",
    ),
    Family("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "expansion_ratio": 2}),
    Family("codegen", {**GPT2, "rotary_dim": 4, "n_ctx": 64}),
    Family("olmo"),
    Family("olmo2"),
    Family("olmo3", WINDOWS),
    Family("olmoe", EXPERTS),
    Family("granite"),
    Family("granitemoe", EXPERTS),
    Family(
        "granitemoehybrid",
        {**EXPERTS, **MAMBA2, "shared_intermediate_size": 16, "layer_types": ["mamba", "mamba", "attention"]},
    ),
    Family("smollm3"),
    Family("starcoder2"),
    Family("stablelm"),
    Family("cohere"),
    Family(
        "cohere2",
        {**WINDOWS, "head_dim": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    Family("glm", {"head_dim": 8}),
    Family("glm4", {"head_dim": 8}),
    Family(
        "glm4_moe",
        {
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    Family("deepseek_v2", LATENT),
    Family("deepseek_v3", LATENT),
    Family("exaone4", {**WINDOWS, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
    Family("ernie4_5"),
    Family("hunyuan_v1_dense", {"head_dim": 8}),
    Family("helium", {"head_dim": 8}),
    Family("arcee"),
    Family("nemotron"),
    Family("persimmon"),
    Family("seed_oss", {"head_dim": 8}),
    Family("apertus"),
    Family("biogpt"),
    Family("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4}),
    Family("nanochat"),
    Family("lfm2", {"layer_types": ["conv", "conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 4}),
    Family(
        "minimax",
        {
            **EXPERTS,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "block_size": 4,
        },
        cached=False,
    ),
    Family(
        "llama4_text",
        {
            **EXPERTS,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 16,
        },
    ),
    Family("bamba", {**MAMBA2, "attn_layer_indices": [2]}),
    Family("falcon_h1", {**MAMBA2, "mamba_d_ssm": 64, "head_dim": 8}),
    Family(
        "jamba",
        {
            **EXPERTS,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
        },
    ),
    Family("mamba", {"state_size": 4, "time_step_rank": 4}),
    Family("mamba2", {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 4}),
    Family("falcon_mamba", {"state_size": 4, "time_step_rank": 4}),
    Family(
        "rwkv",
        {"attention_hidden_size": 32, "rescale_every": 0},
        cached=False,
        note="`config.rescale_every = 0` before wrapping",
    ),
    Family("xlstm", {"num_heads": 4, "num_blocks": 3, "qk_dim_factor": 1.0, "hidden_size": 64}, cached=False),
    Family("vaultgemma", {"head_dim": 8, **WINDOWS, "query_pre_attn_scalar": 8}),
    Family(
        "gemma4_text",
        {
            "head_dim": 8,
            **WINDOWS,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 300,
            "num_kv_shared_layers": 0,
        },
    ),
    Family("cwm", {"head_dim": 8}),
    Family("diffllama"),
    Family("doge", {"attn_implementation": "eager"}, note="with attn_implementation='eager'"),
    Family("jais2"),
    Family("internlm3"),
    Family("minicpm3", LATENT),
    Family("youtu", LATENT),
    Family("openai-gpt", GPT2, replay=False),
    Family(
        "ernie4_5_moe",
        {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    ),
    Family("hunyuan_v1_moe", {**EXPERTS, "head_dim": 8, "moe_topk": 2}),
    Family(
        "lfm2_moe",
        {**EXPERTS, "layer_types": ["conv", "conv", "full_attention"], "conv_L_cache": 3, "num_dense_layers": 1},
    ),
    Family("minimax_m2", {**EXPERTS, "head_dim": 8, "rotary_dim": 4}),
    Family("jetmoe", {**EXPERTS, "kv_channels": 8}),
    Family(
        "qwen3_5_moe_text",
        {
            **EXPERTS,
            **GATED_DELTA,
            "head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
    ),
    Family(
        "exaone_moe",
        {
            **EXPERTS,
            "head_dim": 8,
            **WINDOWS,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    Family("flex_olmo", EXPERTS),
    Family("granitemoeshared", {**EXPERTS, "shared_intermediate_size": 16}),
    Family("afmoe", {**EXPERTS, "head_dim": 8, **WINDOWS, "num_dense_layers": 1}),
    Family("solar_open", {**LATENT, "head_dim": 8}),
    Family("olmo_hybrid", {**GATED_DELTA, "layer_types": ["linear_attention", "linear_attention", "full_attention"]}),
    Family(
        "nemotron_h",
        {
            **MAMBA2,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 4,
            "layers_block_type": ["mamba", "mlp", "attention"],
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
]

#: Families that are refused when they are wrapped, all or part of their layers.
REFUSED = [
    Family("phimoe", {**EXPERTS}),
    Family(
        "zamba2",
        {
            **MAMBA2,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "mamba_headdim": 16,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 4,
        },
    ),
    Family(
        "recurrent_gemma",
        {
            "block_types": ["recurrent", "recurrent", "attention"],
            "attention_window_size": 8,
            "lru_width": 32,
            "head_dim": 8,
        },
    ),
    Family("rwkv", {"attention_hidden_size": 32, "rescale_every": 6}),
    Family("doge"),
    Family(
        "reformer",
        {
            "attn_layers": ["local"] * 3,
            "is_decoder": True,
            "axial_pos_embds": False,
            "attention_head_size": 8,
            "feed_forward_size": 48,
        },
    ),
]
