"""Gemma 2."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "query_pre_attn_scalar": 40,
    "sliding_window": 24,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}

SHARED: dict[str, Any] = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
# Source: as copied in sgl-project/ome, pkg/hfutil/modelconfig/testdata, and in
# mlc-ai/mlc-llm, python/mlc_llm/model/model_preset.py.
PUBLISHED = {
    "gemma-2-2b": Published(
        SHARED
        | {
            "head_dim": 256,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
        },
        2_614_341_888,
    ),
    "gemma-2-9b": Published(
        SHARED
        | {
            "head_dim": 256,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 256,
            "sliding_window_size": 4096,
        },
        9_241_705_984,
    ),
    "gemma-2-27b": Published(
        SHARED
        | {
            "_attn_implementation": "eager",
            "head_dim": 128,
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_attention_heads": 32,
            "num_hidden_layers": 46,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 144,
            "sliding_window_size": 4096,
        },
        27_227_128_320,
    ),
}

ROW = Row(
    module="gemma2",
    architecture="Gemma2ForCausalLM",
    hf=HF,
    variations={
        "mqa": {"num_key_value_heads": 1},
        "untied": {"tie_word_embeddings": False},
        "bias": {"attention_bias": True},
        "no-softcaps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    published=PUBLISHED,
    faults={
        "scale": {"query_pre_attn_scalar": 41},
        "window": {"sliding_window": 25},
        "softcap of scores": {"attn_logit_softcapping": 3.1},
        "softcap of logits": {"final_logit_softcapping": 5.1},
        "pattern": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    },
    linears=r"self_attn|mlp",
    vllm="gemma2:Gemma2ForCausalLM",
)
