"""DeepSeek-V3."""

from typing import Any

from tests.models.rows.deepseek_v2 import HF as V2
from tests.models.zoo import Published, Row

YARN = {**V2["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0}
HF: dict[str, Any] = {
    **V2,
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "rope_scaling": YARN,
}

SHARED: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
}
# Source: DeepSeek-V3 as copied in sgl-project/ome, pkg/hfutil/modelconfig/testdata;
# Moonlight by THUDM/slime, scripts/models/moonlight.sh.
PUBLISHED = {
    # Published in float8; of its 685B parameters 671B are of these layers.
    "DeepSeek-V3": Published(
        SHARED
        | {
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "max_position_embeddings": 163840,
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
            "q_lora_rank": 1536,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10000,
            "routed_scaling_factor": 2.5,
            "topk_group": 4,
            "vocab_size": 129280,
        },
        671_026_419_200,
    ),
    "Moonlight-16B-A3B": Published(
        SHARED
        | {
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 11264,
            "max_position_embeddings": 8192,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": None,
            "rms_norm_eps": 1e-05,
            "rope_theta": 50000.0,
            "routed_scaling_factor": 2.446,
            "topk_group": 1,
            "vocab_size": 163840,
        },
        15_960_110_208,
    ),
}

ROW = Row(
    module="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    hf=HF,
    variations={
        "one group": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
        "plain rope": {"rope_scaling": None},
        "as they are": {"norm_topk_prob": False},
        "bias": {"attention_bias": True},
        "dense": {"first_k_dense_replace": 2},
    },
    published=PUBLISHED,
    faults={
        "sharpening": {"rope_scaling": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.0}},
        "groups": {"topk_group": 3},
        "renormalised": {"norm_topk_prob": False},
    },
    served=("as they are",),
    no_choice={"num_experts_per_tok": 8, "n_group": 2, "topk_group": 2},
    no_adapters="vLLM has no kernel for experts beside adapters on a CPU",
    unquantised=r"kv_b_proj|mlp\.(gate$|experts)",
    vllm="deepseek_v2:DeepseekV3ForCausalLM",
    settings={"max_num_batched_tokens": 256, "attention_config": {"backend": "CPU_MLA"}},
)
