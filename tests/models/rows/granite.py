"""Granite 3."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "granite",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.5,
    "tie_word_embeddings": False,
}

SHARED: dict[str, Any] = {
    "model_type": "granite",
    "attention_bias": False,
    "attention_dropout": 0.1,
    "embedding_multiplier": 12.0,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "vocab_size": 49155,
}
# Source: by foundation-model-stack/foundation-model-stack, fms/models/granite.py; of
# granite-3.1-8b, 3.3-8b was seen, which differs in the vocabulary.
PUBLISHED = {
    "granite-3.1-2b-instruct": Published(
        SHARED
        | {
            "attention_multiplier": 0.015625,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "logits_scaling": 8.0,
            "num_attention_heads": 32,
            "rope_theta": 5000000.0,
        },
        2_533_531_648,
    ),
    "granite-3.1-8b-instruct": Published(
        SHARED
        | {
            "attention_multiplier": 0.0078125,
            "hidden_size": 4096,
            "intermediate_size": 12800,
            "logits_scaling": 16.0,
            "num_attention_heads": 32,
            "rope_theta": 10000000.0,
        },
        8_170_848_256,
    ),
}

ROW = Row(
    module="granite",
    architecture="GraniteForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True, "embedding_multiplier": 2.0},
        "bias": {"attention_bias": True, "mlp_bias": True},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    },
    published=PUBLISHED,
    faults={
        "embedding": {"embedding_multiplier": 3.1},
        "attention": {"attention_multiplier": 0.13},
        "residual": {"residual_multiplier": 0.71},
        "logits": {"logits_scaling": 1.52},
        "theta": {"rope_theta": 9000.0},
    },
    served=("tied",),
    linears=r"self_attn|mlp",
    vllm="granite:GraniteForCausalLM",
)
