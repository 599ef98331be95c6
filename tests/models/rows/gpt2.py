"""GPT-2."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 256,
    "n_positions": 256,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}

SHARED: dict[str, Any] = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "vocab_size": 50257,
}
# Source: gpt2 and gpt2-medium as copied in mlc-ai/mlc-llm,
# python/mlc_llm/model/model_preset.py; the sizes of gpt2-xl by cli99/llm-analysis.
PUBLISHED = {
    "gpt2": Published(SHARED | {"n_embd": 768, "n_head": 12, "n_layer": 12}, 124_439_808),
    "gpt2-medium": Published(
        SHARED
        | {
            "n_embd": 1024,
            "n_head": 16,
            "n_layer": 24,
            "n_special": 0,
            "predict_special_tokens": True,
        },
        354_823_168,
    ),
    "gpt2-xl": Published(SHARED | {"n_embd": 1600, "n_head": 25, "n_layer": 48}, 1_557_611_200),
}

ROW = Row(
    module="gpt2",
    architecture="GPT2LMHeadModel",
    hf=HF,
    variations={
        "untied": {"tie_word_embeddings": False},
        "inner": {"n_inner": 192},
        "by-layer": {"scale_attn_by_inverse_layer_idx": True},
        "unscaled": {"scale_attn_weights": False, "reorder_and_upcast_attn": True},
    },
    published=PUBLISHED,
    faults={
        "scale": {"scale_attn_weights": False},
        "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
        "eps": {"layer_norm_epsilon": 1e-3},
    },
    served=("inner", "by-layer"),
    linears=r"c_attn|c_proj|c_fc",
    is_transposed=True,
    no_int8="vLLM's own class takes the scales of [in, out] matrices for matrices",
    vllm="gpt2:GPT2LMHeadModel",
)
