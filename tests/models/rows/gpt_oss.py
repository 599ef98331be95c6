"""GPT-OSS."""

from typing import Any

from tests.models.zoo import Published, Row

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
HF: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "swiglu_limit": 7.0,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": YARN,
    "sliding_window": 24,
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_dropout": 0.0,
}


# Source: as copied in sgl-project/ome, pkg/hfutil/modelconfig/testdata.
def published(layers: int, experts: int, parameters: int) -> Published:
    """Both sizes differ in these alone."""
    config = {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "output_router_logits": False,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": YARN | {"factor": 32.0, "original_max_position_embeddings": 4096},
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }
    return Published(config, parameters)


ROW = Row(
    module="gpt_oss",
    architecture="GptOssForCausalLM",
    hf=HF,
    variations={
        "mha": {"num_key_value_heads": 4},
        "all full": {"layer_types": ["full_attention"] * 2},
        "tied": {"tie_word_embeddings": True},
        "clamped": {"swiglu_limit": 0.3},
    },
    published={
        "gpt-oss-20b": published(24, 32, 20_914_757_184),
        "gpt-oss-120b": published(36, 128, 116_829_156_672),
    },
    faults={
        "k": {"num_experts_per_tok": 3},
        "window": {"sliding_window": 25},
        "alpha": {"swiglu_alpha": 1.6},
        "limit": {"swiglu_limit": 1.0},
        "theta": {"rope_theta": 140000.0},
    },
    no_choice={"num_experts_per_tok": 4},
    no_adapters="vLLM has no kernel for experts beside adapters on a CPU",
    unquantised=r"mlp\.",
    vllm="gpt_oss:GptOssForCausalLM",
)
