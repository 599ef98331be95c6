"""SmolLM3."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "smollm3",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "no_rope_layer_interval": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 24}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

SHARED: dict[str, Any] = {
    "model_type": "smollm3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "num_key_value_heads": 4,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
# Source: the sizes, theta and layers without rope of SmolLM3-3B as found in tests of several
# projects.
PUBLISHED = {
    "SmolLM3-3B": Published(
        SHARED
        | {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "layer_types": ["full_attention"] * 36,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
        },
        3_075_098_624,
    ),
    # The size of transformers' own defaults: all that was published in a second size.
    "defaults": Published(
        {
            "model_type": "smollm3",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "max_position_embeddings": 32768,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "rope_theta": 2000000.0,
            "vocab_size": 128256,
        },
        3_075_098_624,
    ),
}

ROW = Row(
    module="smollm3",
    architecture="SmolLM3ForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "bias": {"attention_bias": True, "mlp_bias": True},
        "window": WINDOW,
        "window-everywhere": WINDOW | {"layer_types": ["sliding_attention"] * 2},
        "list": {"no_rope_layers": [0, 1]},
        "yarn": {"rope_scaling": YARN},
    },
    published=PUBLISHED,
    faults={
        "which layers rotate": {"no_rope_layers": [0, 1]},
        "theta": {"rope_theta": 40000.0},
        "window": WINDOW,
        "eps": {"rms_norm_eps": 1e-3},
    },
    served=("window", "list"),
    linears=r"self_attn|mlp",
    vllm="transformers:TransformersForCausalLM",  # vLLM 0.32 has no class of its own
)
