"""DeepSeek-V2."""

from typing import Any

from tests.models.zoo import Published, Row

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
HF: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 512,  # with rope's 64, what the engine has a kernel for on a CPU
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
}

SHARED: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
# Source: DeepSeek-V2-Lite as copied in mlc-ai/mlc-llm,
# python/mlc_llm/model/model_preset.py; the rest by their numbers of parameters alone.
PUBLISHED = {
    "DeepSeek-V2-Lite": Published(
        SHARED
        | {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "topk_method": "greedy",
        },
        15_706_484_224,
    ),
    "DeepSeek-V2": Published(
        SHARED
        | {
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_group": 8,
            "n_routed_experts": 160,
            "num_attention_heads": 128,
            "num_hidden_layers": 60,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "routed_scaling_factor": 16.0,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
        },
        235_741_434_880,
    ),
}

ROW = Row(
    module="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    hf=HF,
    variations={
        "lite": {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
        "plain rope": {"rope_scaling": None},
        "bias": {"attention_bias": True},
        "tied": {"tie_word_embeddings": True},
        "dense": {"first_k_dense_replace": 2},
    },
    published=PUBLISHED,
    faults={
        "theta": {"rope_theta": 9000.0},
        "sharpening": {"rope_scaling": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.0}},
        "groups": {"topk_group": 3},
        "routed scale": {"routed_scaling_factor": 1.4},
    },
    served=("lite", "plain rope"),
    no_choice={"num_experts_per_tok": 8, "n_group": 2, "topk_group": 2},
    no_adapters="vLLM has no kernel for experts beside adapters on a CPU",
    unquantised=r"kv_b_proj|mlp\.(gate$|experts)",
    vllm="deepseek_v2:DeepseekV2ForCausalLM",
    settings={"max_num_batched_tokens": 256, "attention_config": {"backend": "CPU_MLA"}},
)
