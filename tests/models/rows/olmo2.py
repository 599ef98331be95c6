"""OLMo 2."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "olmo2",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}

SHARED: dict[str, Any] = {
    "model_type": "olmo2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
# Source: 7B and 32B by mlc-ai/mlc-llm, python/mlc_llm/model/model_preset.py; 1B by
# allenai/OLMo, configs/official-0425.
PUBLISHED = {
    "OLMo-2-0425-1B": Published(
        SHARED
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
        },
        1_484_916_736,
    ),
    "OLMo-2-1124-7B": Published(
        SHARED
        | {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
        },
        7_298_617_344,
    ),
    "OLMo-2-0325-32B": Published(
        SHARED
        | {
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_attention_heads": 40,
            "num_hidden_layers": 64,
            "num_key_value_heads": 8,
        },
        32_234_279_936,
    ),
}

ROW = Row(
    module="olmo2",
    architecture="Olmo2ForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "bias": {"attention_bias": True},
        "yarn": {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    },
    published=PUBLISHED,
    faults={"theta": {"rope_theta": 400000.0}, "eps": {"rms_norm_eps": 1e-3}},
    served=("mha",),
    linears=r"self_attn|mlp",
    vllm="transformers:TransformersForCausalLM",  # vLLM 0.32 has no class of its own
)
