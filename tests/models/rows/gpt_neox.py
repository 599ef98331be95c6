"""GPT-NeoX and Pythia."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "hidden_act": "gelu",
    "use_parallel_residual": True,
}

SHARED: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
}
# Source: the sizes of Pythia by EleutherAI/pythia, models/*/*.yml; gpt-neox-20b by its
# number of parameters alone.
PUBLISHED = {
    "pythia-70m": Published(
        SHARED
        | {
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "num_hidden_layers": 6,
            "vocab_size": 50304,
        },
        70_426_624,
    ),
    "pythia-1.4b": Published(
        SHARED
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "vocab_size": 50304,
        },
        1_414_647_808,
    ),
    "pythia-12b": Published(
        SHARED
        | {
            "hidden_size": 5120,
            "intermediate_size": 20480,
            "num_attention_heads": 40,
            "num_hidden_layers": 36,
            "vocab_size": 50688,
        },
        11_846_072_320,
    ),
    "gpt-neox-20b": Published(
        SHARED
        | {
            "attention_probs_dropout_prob": 0,
            "hidden_act": "gelu_fast",
            "hidden_dropout_prob": 0,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_attention_heads": 64,
            "num_hidden_layers": 44,
            "vocab_size": 50432,
        },
        20_554_567_680,
    ),
}

ROW = Row(
    module="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    hf=HF,
    variations={
        "sequential": {"use_parallel_residual": False},
        "half": {"rotary_pct": 0.5},
        "whole": {"rotary_pct": 1.0},
        "no-bias": {"attention_bias": False},
        "tied": {"tie_word_embeddings": True},
        "tanh": {"hidden_act": "gelu_fast"},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    },
    published=PUBLISHED,
    faults={
        "parallel": {"use_parallel_residual": False},
        "rotated part": {"rotary_pct": 0.5},
        "base": {"rotary_emb_base": 9000},
        "gelu": {"hidden_act": "gelu_new"},
        "eps": {"layer_norm_eps": 1e-3},
    },
    served=("sequential", "half", "no-bias"),
    linears=r"dense",  # but those of queries, keys and values, which are in turns
    no_int8="vLLM has no class to compare with",
    vllm=None,
    no_vllm="vLLM 0.32 has none, and its transformers backend finds no place for embed_out",
)
