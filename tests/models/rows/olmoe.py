"""OLMoE."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "olmoe",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "clip_qkv": None,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
}

SHARED: dict[str, Any] = {
    "model_type": "olmoe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
}
# Source: by NVIDIA-NeMo/Megatron-Bridge, tests/unit_tests/models/olmoe.
PUBLISHED = {  # of one size
    "OLMoE-1B-7B-0924": Published(SHARED, 6_919_161_856),
    "OLMoE-1B-7B-0125": Published(SHARED, 6_919_161_856),
}

ROW = Row(
    module="olmoe",
    architecture="OlmoeForCausalLM",
    hf=HF,
    variations={
        "gqa": {"num_key_value_heads": 2},
        "renormalised": {"norm_topk_prob": True},
        "clipped": {"clip_qkv": 0.8},
        "tied": {"tie_word_embeddings": True},
    },
    published=PUBLISHED,
    faults={
        "k": {"num_experts_per_tok": 5},
        "renormalised": {"norm_topk_prob": True},
        "clip": {"clip_qkv": 1.0},
        "theta": {"rope_theta": 9000.0},
    },
    served=("clipped",),
    no_choice={"num_experts_per_tok": 8},
    no_adapters="vLLM has no kernel for experts beside adapters on a CPU",
    unquantised=r"mlp\.",
    vllm="olmoe:OlmoeForCausalLM",
)
