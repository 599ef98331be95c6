"""Gemma 3, its text model."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 40,
    "sliding_window": 24,
    "sliding_window_pattern": 2,
    "hidden_activation": "gelu_pytorch_tanh",
}

SHARED: dict[str, Any] = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "sliding_window": 512,
}
# Source: gemma-3-1b-it and 27b-it as copied in sgl-project/ome,
# pkg/hfutil/modelconfig/testdata; gemma-3-270m by its number of parameters alone.
PUBLISHED = {
    "gemma-3-270m": Published(
        SHARED
        | {
            "_sliding_window_pattern": 6,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
            "num_attention_heads": 4,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rope_scaling": None,
            "use_bidirectional_attention": False,
            "vocab_size": 262144,
        },
        268_098_176,
    ),
    "gemma-3-1b-it": Published(
        SHARED
        | {
            "cache_implementation": "hybrid",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "rope_scaling": None,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        999_885_952,
    ),
    "gemma-3-27b-it, text_config": Published(
        {
            "model_type": "gemma3_text",
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        27_009_346_304,
    ),
}

ROW = Row(
    module="gemma3",
    architecture="Gemma3ForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "untied": {"tie_word_embeddings": False},
        "bias": {"attention_bias": True},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "final-softcap": {"final_logit_softcapping": 10.0},
    },
    published=PUBLISHED,
    faults={
        "scale": {"query_pre_attn_scalar": 41},
        "window": {"sliding_window": 25},
        "pattern": {"sliding_window_pattern": 3},
        "theta": {"rope_theta": 900000.0},
        "local theta": {"rope_local_base_freq": 11000.0},
        "softcap": {"final_logit_softcapping": 30.0},
    },
    served=("linear", "final-softcap", "untied"),
    linears=r"self_attn|mlp",
    vllm="gemma3:Gemma3ForCausalLM",
)
