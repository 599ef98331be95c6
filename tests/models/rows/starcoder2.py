"""StarCoder2."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "starcoder2",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "norm_epsilon": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "gelu_pytorch_tanh",
    "sliding_window": 24,
    "use_bias": True,
    "tie_word_embeddings": False,
}

SHARED: dict[str, Any] = {
    "model_type": "starcoder2",
    "attention_dropout": 0.1,
    "embedding_dropout": 0.1,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 16384,
    "mlp_type": "default",
    "norm_epsilon": 1e-05,
    "norm_type": "layer_norm",
    "residual_dropout": 0.1,
    "sliding_window": 4096,
    "use_bias": True,
    "vocab_size": 49152,
}
# Source: starcoder2-7b as copied in mlc-ai/mlc-llm, python/mlc_llm/model/model_preset.py; the
# rest by their numbers of parameters alone.
PUBLISHED = {
    "starcoder2-3b": Published(
        SHARED
        | {
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_attention_heads": 24,
            "num_hidden_layers": 30,
            "num_key_value_heads": 2,
            "rope_theta": 999999.4420358813,
        },
        3_030_371_328,
    ),
    "starcoder2-7b": Published(
        SHARED
        | {
            "hidden_size": 4608,
            "intermediate_size": 18432,
            "num_attention_heads": 36,
            "num_hidden_layers": 32,
            "num_key_value_heads": 4,
            "rope_theta": 1000000,
            "activation_function": "gelu",
            "attention_softmax_in_fp32": True,
            "layer_norm_epsilon": 1e-05,
            "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": True,
        },
        7_173_923_840,
    ),
    "starcoder2-15b": Published(
        SHARED
        | {
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_attention_heads": 48,
            "num_hidden_layers": 40,
            "num_key_value_heads": 4,
            "rope_theta": 100000,
            "tie_word_embeddings": False,
        },
        15_957_889_024,
    ),
}

ROW = Row(
    module="starcoder2",
    architecture="Starcoder2ForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "no-bias": {"use_bias": False},
        "no-window": {"sliding_window": None},
    },
    published=PUBLISHED,
    faults={
        "window": {"sliding_window": 25},
        "theta": {"rope_theta": 90000.0},
        "eps": {"norm_epsilon": 1e-3},
    },
    served=("no-bias", "no-window"),
    linears=r"self_attn|mlp",
    vllm="transformers:TransformersForCausalLM",  # vLLM 0.32 has no class of its own
)
