"""Mixtral."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "sliding_window": None,
}
WINDOW = {"sliding_window": 24}

SHARED: dict[str, Any] = {
    "model_type": "mixtral",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
# Source: as copied in ai-dynamo/aiconfigurator,
# aic-core/src/aiconfigurator_core/model_configs.
PUBLISHED = {
    "Mixtral-8x7B-v0.1": Published(
        SHARED
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "router_aux_loss_coef": 0.02,
        },
        46_702_792_704,
    ),
    "Mixtral-8x22B-v0.1": Published(
        SHARED
        | {
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "max_position_embeddings": 65536,
            "num_attention_heads": 48,
            "num_hidden_layers": 56,
            "router_aux_loss_coef": 0.001,
        },
        140_620_634_112,
    ),
}

ROW = Row(
    module="mixtral",
    architecture="MixtralForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "window": WINDOW,
        "tied": {"tie_word_embeddings": True},
        "one": {"num_experts_per_tok": 1},
    },
    published=PUBLISHED,
    faults={
        "k": {"num_experts_per_tok": 1},
        "theta": {"rope_theta": 900000.0},
        "window": {"sliding_window": 39},
    },
    served=("window",),
    no_choice={"num_experts_per_tok": 4},
    no_adapters="vLLM has no kernel for experts beside adapters on a CPU",
    unquantised=r"block_sparse_moe",
    vllm="mixtral:MixtralForCausalLM",
)
