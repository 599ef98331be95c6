"""GLM-4-MoE."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "glm4_moe",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "use_qk_norm": True,
}

SHARED: dict[str, Any] = {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "vocab_size": 151552,
}
# The checkpoints hold 358_337_791_296 and 110_468_824_832: in them is a layer that predicts a
# further token, 5_539_962_272 and 3_616_573_568 with its copies of the embedding and of the head.
# Source: the sizes by NVIDIA-NeMo/Megatron-Bridge, tests/unit_tests/models/glm; thetas,
# routing and scaling by THUDM/slime, scripts/models/glm4.5-*.sh.
PUBLISHED = {
    "GLM-4.5": Published(
        SHARED
        | {
            "first_k_dense_replace": 3,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "num_hidden_layers": 92,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
        },
        352_797_829_024,
    ),
    "GLM-4.5-Air": Published(
        SHARED
        | {
            "first_k_dense_replace": 1,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "num_hidden_layers": 46,
            "routed_scaling_factor": 1.0,
            "use_qk_norm": False,
        },
        106_852_251_264,
    ),
}

ROW = Row(
    module="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    hf=HF,
    variations={
        "air": {"use_qk_norm": False, "routed_scaling_factor": 1.0},
        "mha": {"num_key_value_heads": 4, "attention_bias": False},
        "mqa": {"num_key_value_heads": 1},
        "groups": {"n_group": 4, "topk_group": 2, "n_shared_experts": 2},
        "as they are": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        "whole heads": {"partial_rotary_factor": 1.0},
        "tied": {"tie_word_embeddings": True},
        "dense": {"first_k_dense_replace": 2},
    },
    published=PUBLISHED,
    faults={
        "k": {"num_experts_per_tok": 4},
        "renormalised": {"norm_topk_prob": False},
        "scaling": {"routed_scaling_factor": 2.4},
        "rotated": {"partial_rotary_factor": 1.0},
        "theta": {"rope_theta": 900000.0},
    },
    served=("air",),
    no_choice={"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1},
    no_adapters="vLLM has no kernel for experts beside adapters on a CPU",
    unquantised=r"mlp\.(gate$|experts)",
    vllm="glm4_moe:Glm4MoeForCausalLM",
)
