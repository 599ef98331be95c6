"""Phi-3 and Phi-4-mini."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "sliding_window": 24,
    "pad_token_id": 0,
}


def longrope(pairs: int, original: int) -> dict[str, Any]:
    """Scaling of so many pairs of features, beyond an original length."""
    return {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i / 40 for i in range(pairs)],
            "long_factor": [2.0 + i / 4 for i in range(pairs)],
        },
        "original_max_position_embeddings": original,
    }


SHARED: dict[str, Any] = {
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
}
PHI_4_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845,
    5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158,
    11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105,
    25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71,
    32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
# Source: Phi-4-mini-instruct as copied in mlc-ai/mlc-llm,
# python/mlc_llm/model/model_preset.py; Phi-3-mini-4k-instruct by Lightning-AI/litgpt,
# litgpt/config.py; Phi-3-medium by its number of parameters alone.
PUBLISHED = {
    "Phi-3-mini-4k-instruct": Published(
        SHARED
        | {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pad_token_id": 32000,
            "rope_scaling": None,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
        3_821_079_552,
    ),
    "Phi-3-medium-4k-instruct": Published(
        SHARED
        | {
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "max_position_embeddings": 4096,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 10,
            "rope_scaling": None,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
        13_960_238_080,
    ),
    "Phi-4-mini-instruct": Published(
        SHARED
        | {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": PHI_4_LONG,
            },
            "full_attn_mod": 1,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pad_token_id": 199999,
            "partial_rotary_factor": 0.75,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
        3_836_021_760,
    ),
}

ROW = Row(
    module="phi3",
    architecture="Phi3ForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "no-window": {"sliding_window": None},
        "partial": {"partial_rotary_factor": 0.75},
        "longrope-short": longrope(16, 256) | {"max_position_embeddings": 512},
        "longrope-long": longrope(16, 16),
        "longrope-partial": longrope(12, 16) | {"partial_rotary_factor": 0.75},
    },
    published=PUBLISHED,
    faults={
        "window": {"sliding_window": 25},
        "theta": {"rope_theta": 9000.0},
        "rotated part": {"partial_rotary_factor": 0.75},
        "longrope": longrope(16, 16),
        "eps": {"rms_norm_eps": 1e-2},
    },
    served=("no-window", "partial", "longrope-short"),
    linears=r"qkv_proj|gate_up_proj|o_proj|down_proj",
    vllm="phi3:Phi3ForCausalLM",
)
