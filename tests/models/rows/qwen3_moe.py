"""Qwen3-MoE."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
}

SHARED: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Source: as copied in ai-dynamo/aiconfigurator, aic-core/src/aiconfigurator_core/model_configs.
PUBLISHED = {
    "Qwen3-30B-A3B": Published(
        SHARED
        | {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_window_layers": 48,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_hidden_layers": 48,
        },
        30_532_122_624,
    ),
    "Qwen3-235B-A22B": Published(
        SHARED
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_window_layers": 94,
            "moe_intermediate_size": 1536,
            "num_attention_heads": 64,
            "num_hidden_layers": 94,
        },
        235_093_634_560,
    ),
}

ROW = Row(
    module="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    hf=HF,
    variations={
        "as they are": {"norm_topk_prob": False},
        "tied": {"tie_word_embeddings": True},
        "bias": {"attention_bias": True},
        "every second": {"decoder_sparse_step": 2},
        "dense last": {"mlp_only_layers": [1]},
    },
    published=PUBLISHED,
    faults={
        "k": {"num_experts_per_tok": 3},
        "renormalised": {"norm_topk_prob": False},
        "theta": {"rope_theta": 900000.0},
    },
    served=("as they are", "every second"),
    no_choice={"num_experts_per_tok": 8},
    no_adapters="vLLM has no kernel for experts beside adapters on a CPU",
    unquantised=r"mlp\.",
    vllm="qwen3_moe:Qwen3MoeForCausalLM",
)
