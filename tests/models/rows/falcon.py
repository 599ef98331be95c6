"""Falcon."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "falcon",
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "num_kv_heads": 2,
    "new_decoder_architecture": True,
}
OLD = {"new_decoder_architecture": False, "num_kv_heads": None}
RW = {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}

SHARED: dict[str, Any] = {
    "model_type": "falcon",
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "layer_norm_epsilon": 1e-05,
    "vocab_size": 65024,
}
# Source: the sizes of falcon-7b and falcon-40b by Lightning-AI/litgpt, litgpt/config.py;
# the rest by their numbers of parameters alone.
PUBLISHED = {
    "falcon-rw-1b": Published(
        SHARED
        | RW
        | {
            "hidden_size": 2048,
            "new_decoder_architecture": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "vocab_size": 50304,
        },
        1_311_625_216,
    ),
    "falcon-7b": Published(
        SHARED
        | {
            "alibi": False,
            "bias": False,
            "hidden_size": 4544,
            "multi_query": True,
            "new_decoder_architecture": False,
            "num_attention_heads": 71,
            "num_hidden_layers": 32,
            "parallel_attn": True,
        },
        6_921_720_704,
    ),
    "falcon-40b": Published(
        SHARED
        | {
            "alibi": False,
            "bias": False,
            "hidden_size": 8192,
            "new_decoder_architecture": True,
            "num_attention_heads": 128,
            "num_hidden_layers": 60,
            "num_kv_heads": 8,
            "parallel_attn": True,
        },
        41_303_293_952,
    ),
    "falcon-11B": Published(
        SHARED
        | {
            "activation": "gelu",
            "alibi": False,
            "bias": False,
            "ffn_hidden_size": 16384,
            "hidden_size": 4096,
            "max_position_embeddings": 8192,
            "multi_query": True,
            "new_decoder_architecture": True,
            "num_attention_heads": 32,
            "num_hidden_layers": 60,
            "num_kv_heads": 8,
            "num_ln_in_parallel_attn": 1,
            "parallel_attn": True,
            "rope_scaling": None,
            "rope_theta": 5000042.0,
            "tie_word_embeddings": False,
        },
        11_102_822_400,
    ),
}

ROW = Row(
    module="falcon",
    architecture="FalconForCausalLM",
    hf=HF,
    variations={
        "inner": {"ffn_hidden_size": 192},
        "one-norm": {"num_ln_in_parallel_attn": 1},
        "mha": {"num_kv_heads": 4},
        "untied": {"tie_word_embeddings": False},
        "bias": {"bias": True},
        "7b": OLD,
        "rw": OLD | RW,
        "rw-rotary": OLD | RW | {"alibi": False, "bias": False},
        "rw-multi-query": OLD | RW | {"multi_query": True},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    },
    published=PUBLISHED,
    faults={
        "theta": {"rope_theta": 9000.0},
        "eps": {"layer_norm_epsilon": 1e-3},
        "alibi": {"alibi": True},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 1.1}},
    },
    served=("inner", "one-norm", "7b", "rw"),
    linears=r"dense",
    vllm="falcon:FalconForCausalLM",
    peer="sdpa",  # eagerly, transformers adds the biases of ALiBi twice
)
