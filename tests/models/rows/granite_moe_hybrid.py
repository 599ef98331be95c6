"""Granite 4 hybrid."""

from typing import Any

from tests.models.rows.mamba2 import norm_by_group
from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "granitemoehybrid",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 64,
    "shared_intermediate_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "attention", "mamba", "attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "position_embedding_type": "nope",
    "max_position_embeddings": 256,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "mamba_n_heads": 16,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "rms_norm_eps": 1e-5,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.5,
    "tie_word_embeddings": True,
}

SHARED: dict[str, Any] = {
    "model_type": "granitemoehybrid",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embedding_multiplier": 12,
    "hidden_act": "silu",
    "init_method": "mup",
    "initializer_range": 0.1,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "normalization_function": "rmsnorm",
    "num_hidden_layers": 40,
    "output_router_logits": False,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 100352,
}


def layers(count: int, *attend: int) -> list[str]:
    """Attention in these layers."""
    return ["attention" if i in attend else "mamba" for i in range(count)]


# Source: sizes and layers as copied in others' tests, H-350M whole; the multipliers of H-Tiny and
# H-Small were not seen.
PUBLISHED = {
    "granite-4.0-h-350m": Published(
        SHARED
        | {
            "attention_multiplier": 0.015625,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "layer_types": layers(32, 10, 13, 17, 27),
            "logits_scaling": 3,
            "mamba_d_head": 32,
            "mamba_n_heads": 48,
            "max_position_embeddings": 32768,
            "num_attention_heads": 12,
            "num_experts_per_tok": 0,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
            "num_local_experts": 0,
            "residual_multiplier": 0.246,
            "shared_intermediate_size": 2048,
        },
        340_332_224,
    ),
    "granite-4.0-h-tiny": Published(
        SHARED
        | {
            "attention_multiplier": 0.0078125,
            "hidden_size": 1536,
            "intermediate_size": 512,
            "layer_types": layers(40, 5, 15, 25, 35),
            "logits_scaling": 6,
            "mamba_d_head": 64,
            "mamba_n_heads": 48,
            "num_attention_heads": 12,
            "num_experts_per_tok": 6,
            "num_key_value_heads": 4,
            "num_local_experts": 64,
            "shared_intermediate_size": 1024,
        },
        6_939_037_248,
    ),
    "granite-4.0-h-small": Published(
        SHARED
        | {
            "attention_multiplier": 0.0078125,
            "hidden_size": 4096,
            "intermediate_size": 768,
            "layer_types": layers(40, 5, 15, 25, 35),
            "logits_scaling": 16,
            "mamba_d_head": 64,
            "mamba_n_heads": 128,
            "num_attention_heads": 32,
            "num_experts_per_tok": 10,
            "num_key_value_heads": 8,
            "num_local_experts": 72,
            "shared_intermediate_size": 1536,
        },
        32_207_337_984,
    ),
    "granite-4.0-micro": Published(
        SHARED
        | {
            "attention_multiplier": 0.015625,
            "hidden_size": 2560,
            "intermediate_size": 8192,
            "layer_types": layers(40, *range(40)),
            "logits_scaling": 10,
            "mamba_d_head": 40,
            "mamba_d_state": 256,
            "mamba_n_heads": 128,
            "num_attention_heads": 40,
            "num_experts_per_tok": 0,
            "num_key_value_heads": 8,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "rope_theta": 10000000,
            "shared_intermediate_size": 8192,
        },
        3_402_836_480,
    ),
}

ROW = Row(
    module="granite_moe_hybrid",
    architecture="GraniteMoeHybridForCausalLM",
    hf=HF,
    variations={
        "dense": {"num_local_experts": 0, "num_experts_per_tok": 0, "mamba_n_groups": 2},
        "attention": {
            "layer_types": ["attention"] * 4,
            "position_embedding_type": "rope",
            "rope_theta": 1000000.0,
        },
        "mixers": {
            "layer_types": None,
            "use_cache": False,  # which transformers has not without attention
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
        },
        "bias": {"attention_bias": True, "tie_word_embeddings": False},
    },
    published=PUBLISHED,
    faults={
        "k": {"num_experts_per_tok": 3},
        "rope": {"position_embedding_type": "rope"},
        "eps": {"rms_norm_eps": 1e-3},
        "limit": {"time_step_limit": [0.05, 0.5]},
        "embedding": {"embedding_multiplier": 3.1},
        "attention": {"attention_multiplier": 0.13},
        "residual": {"residual_multiplier": 0.71},
        "logits": {"logits_scaling": 1.52},
    },
    served=("dense",),
    no_choice={"num_experts_per_tok": 8},
    no_adapters="vLLM has no kernel for experts beside adapters on a CPU",
    no_int8="a last bit from its own class's states turns an int8: then it is off by 0.02",
    vllm="granitemoehybrid:GraniteMoeHybridForCausalLM",
    amend=norm_by_group,
    settings={"enable_prefix_caching": False},
)
