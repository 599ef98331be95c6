"""LFM2."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "lfm2",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 288,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_multiple_of": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "max_position_embeddings": 256,
    "norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    # vLLM's own class looks at these.
    "conv_dim": 128,
    "conv_dim_out": 128,
    "block_dim": 128,
    "block_ff_dim": 288,
}

SHARED: dict[str, Any] = {
    "model_type": "lfm2",
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-05,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_use_xavier_init": True,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-05,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "use_cache": True,
    "use_pos_enc": True,
    "vocab_size": 65536,
}
# Source: none was found; by their numbers of parameters alone.
PUBLISHED = {
    "LFM2-350M": Published(
        SHARED
        | {
            "block_dim": 1024,
            "block_ff_dim": 6656,
            "conv_dim": 1024,
            "conv_dim_out": 1024,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_heads": 16,
        },
        354_483_968,
    ),
    "LFM2-1.2B": Published(
        SHARED
        | {
            "block_dim": 2048,
            "block_ff_dim": 12288,
            "conv_dim": 2048,
            "conv_dim_out": 2048,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_heads": 32,
        },
        1_170_340_608,
    ),
}

ROW = Row(
    module="lfm2",
    architecture="Lfm2ForCausalLM",
    hf=HF,
    variations={
        "bias": {"conv_bias": True},
        "untied": {"tie_word_embeddings": False},
        "as many as written": {"block_auto_adjust_ff_dim": False},
        "wider": {"conv_L_cache": 4, "block_ffn_dim_multiplier": 1.5},
        "mostly conv": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    },
    published=PUBLISHED,
    faults={
        "theta": {"rope_theta": 900000.0},
        "eps": {"norm_eps": 1e-3},
    },
    served=("bias", "untied"),
    linears=r"self_attn|feed_forward|conv\.out_proj",  # conv.in_proj is three layers
    vllm="lfm2:Lfm2ForCausalLM",
    settings={"enable_prefix_caching": False},
)
