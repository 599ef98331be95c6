"""Qwen3."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

SHARED: dict[str, Any] = {
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Source: as copied in ai-dynamo/aiconfigurator,
# aic-core/src/aiconfigurator_core/model_configs.
PUBLISHED = {
    "Qwen3-0.6B": Published(
        SHARED
        | {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "Qwen3-8B": Published(
        SHARED
        | {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_window_layers": 36,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "tie_word_embeddings": False,
        },
        8_190_735_360,
    ),
    "Qwen3-32B": Published(
        SHARED
        | {
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "max_window_layers": 64,
            "num_attention_heads": 64,
            "num_hidden_layers": 64,
            "tie_word_embeddings": False,
        },
        32_762_123_264,
    ),
}

ROW = Row(
    module="qwen3",
    architecture="Qwen3ForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "bias": {"attention_bias": True},
        "window": WINDOW,
        "yarn": {"rope_scaling": YARN},
    },
    published=PUBLISHED,
    faults={
        "theta": {"rope_theta": 900000.0},
        "eps": {"rms_norm_eps": 1e-3},
        "window": {**WINDOW, "sliding_window": 39},
    },
    served=("tied", "window"),
    linears=r"self_attn|mlp",
    vllm="qwen3:Qwen3ForCausalLM",
)
