"""Cohere's Command-R."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "cohere",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "logit_scale": 0.6,
}

SHARED: dict[str, Any] = {
    "model_type": "cohere",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 8192,
    "use_qk_norm": False,
    "vocab_size": 256000,
}
# Source: aya-23-8B as copied in mlc-ai/mlc-llm, python/mlc_llm/model/model_preset.py; the
# sizes of command-r-v01 in sgl-project/ome, pkg/hfutil/modelconfig/testdata; the rest by their
# numbers of parameters alone.
PUBLISHED = {
    "aya-23-8B": Published(
        SHARED
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "logit_scale": 0.0625,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rope_theta": 10000,
        },
        8_028_033_024,
    ),
    "c4ai-command-r-v01": Published(
        SHARED
        | {
            "hidden_size": 8192,
            "intermediate_size": 22528,
            "logit_scale": 0.0625,
            "model_max_length": 131072,
            "num_attention_heads": 64,
            "num_hidden_layers": 40,
            "num_key_value_heads": 64,
            "pretraining_tp": 1,
            "rope_theta": 8000000.0,
        },
        34_980_831_232,
    ),
    "c4ai-command-r-plus": Published(
        SHARED
        | {
            "hidden_size": 12288,
            "intermediate_size": 33792,
            "logit_scale": 0.8333333333333334,
            "num_attention_heads": 96,
            "num_hidden_layers": 64,
            "num_key_value_heads": 8,
            "rope_theta": 75000000.0,
            "use_qk_norm": True,
        },
        103_810_674_688,
    ),
}

ROW = Row(
    module="cohere",
    architecture="CohereForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "mqa": {"num_key_value_heads": 1},
        "qk-norm": {"use_qk_norm": True},
        "bias": {"attention_bias": True},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    },
    published=PUBLISHED,
    faults={
        "logit scale": {"logit_scale": 0.61},
        "theta": {"rope_theta": 9000.0},
        "eps": {"layer_norm_eps": 1e-3},
    },
    served=("qk-norm",),
    linears=r"self_attn|mlp",
    vllm="commandr:CohereForCausalLM",
)
