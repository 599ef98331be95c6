"""Llama as a classifier of sequences."""

from typing import Any

from tests.models.rows import qwen3
from tests.models.zoo import Published, Row

TINY = {**qwen3.HF, "model_type": "llama", "rope_theta": 10000.0}
HF = {**TINY, "pad_token_id": 0, "num_labels": 5}

SHARED: dict[str, Any] = {
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "id2label": {"0": "LABEL_0"},
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
ROPE = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# Source: Skywork-Reward-Llama-3.1-8B and Llama-3.2-1B as copied in sgl-project/ome,
# pkg/hfutil/modelconfig/testdata, Llama-3.1-8B in ai-dynamo/aiconfigurator,
# aic-core/src/aiconfigurator_core/model_configs.
LLAMA_8B: dict[str, Any] = {
    **SHARED,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "rope_scaling": {**ROPE, "factor": 8.0},
    "tie_word_embeddings": False,
}
LLAMA_1B: dict[str, Any] = {
    **SHARED,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {**ROPE, "factor": 32.0},
    "tie_word_embeddings": True,
}

ROW = Row(
    module="llama_classifier",
    architecture="LlamaForSequenceClassification",
    hf=HF,
    variations={
        "one label": {"num_labels": 1},
        "regression": {"num_labels": 1, "problem_type": "regression"},
        "tied": {"tie_word_embeddings": True},
    },
    published={
        "Skywork-Reward-Llama-3.1-8B": Published(LLAMA_8B, 7_504_928_768),
        "Skywork-Reward-V2-Llama-3.2-1B": Published(LLAMA_1B, 1_235_814_400 + 2048),
    },
    faults={"theta": {"rope_theta": 9000.0}, "eps": {"rms_norm_eps": 1e-3}},
    served=("one label", "regression"),
    vllm="llama:LlamaForCausalLM",
    layer="",
    linears=r"self_attn|mlp",
)
