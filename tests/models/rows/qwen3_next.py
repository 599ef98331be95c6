"""Qwen3-Next."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "qwen3_next",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000000.0,
    "partial_rotary_factor": 0.25,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
}

# There is one size, and the checkpoints of it differ in the base of rope. That of Instruct, as that
# of Thinking, has tensors of a layer that predicts a further token beside.
# Source: no whole copy was found; sizes as in THUDM/slime, scripts/models/qwen3-next-80B-A3B.sh,
# and both bases of rope as other projects' tests quote them. The number of parameters is that of
# Coder-Next's tensors.
SHARED: dict[str, Any] = {
    "model_type": "qwen3_next",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 151936,
}
PUBLISHED = {
    "Qwen3-Next-80B-A3B-Instruct": Published(SHARED | {"rope_theta": 10000000}, 79_674_391_296),
    "Qwen3-Coder-Next": Published(SHARED | {"rope_theta": 5000000}, 79_674_391_296),
}

ROW = Row(
    module="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    hf=HF,
    variations={
        "every fourth": {"layer_types": None, "linear_num_value_heads": 2},
        "other heads": {"linear_num_value_heads": 8, "linear_value_head_dim": 24},
        "bias, tied": {"attention_bias": True, "tie_word_embeddings": True},
        "as they are": {"norm_topk_prob": False, "partial_rotary_factor": 1.0},
        "dense": {"decoder_sparse_step": 2, "mlp_only_layers": [1], "linear_conv_kernel_dim": 3},
    },
    published=PUBLISHED,
    faults={
        "k": {"num_experts_per_tok": 3},
        "renormalised": {"norm_topk_prob": False},
        "rotated": {"partial_rotary_factor": 0.5},
        "theta": {"rope_theta": 90000.0},
    },
    served=("dense",),
    no_choice={"num_experts_per_tok": 8},
    no_adapters="vLLM has no kernel for experts beside adapters on a CPU",
    no_int8="vLLM's own class takes bfloat16 alone on a CPU",
    no_vllm="its gated delta rule takes bfloat16 alone on a CPU",
    narrow_vllm="qwen3_next:Qwen3NextForCausalLM",
    settings={"enable_prefix_caching": False},
)
