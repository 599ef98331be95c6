"""ModernBERT."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "modernbert",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "global_attn_every_n_layers": 2,
    "local_attention": 24,
    "norm_eps": 1e-5,
    "hidden_activation": "gelu",
    "pad_token_id": 0,
    "pooling": "mean",
    "normalize": True,
}

SHARED: dict[str, Any] = {
    "model_type": "modernbert",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "initializer_cutoff_factor": 2.0,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "norm_bias": False,
    "norm_eps": 1e-05,
    "pad_token_id": 50283,
    "pooling": "cls",
    "position_embedding_type": "absolute",
    "reference_compile": True,
    "sep_token_id": 50282,
    "tie_word_embeddings": True,
    "vocab_size": 50368,
}
# As published, without the masked model's head: its matrix, its norm and the bias of the logits.
# Source: the sizes, windows and thetas as found in tests of several projects.
PUBLISHED = {
    "ModernBERT-base": Published(
        SHARED
        | {
            "hidden_size": 768,
            "intermediate_size": 1152,
            "num_attention_heads": 12,
            "num_hidden_layers": 22,
        },
        149_655_232 - 768**2 - 768 - 50368,
    ),
    "ModernBERT-large": Published(
        SHARED
        | {
            "hidden_size": 1024,
            "intermediate_size": 2624,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
        },
        395_881_664 - 1024**2 - 1024 - 50368,
    ),
}

ROW = Row(
    module="modernbert",
    architecture="ModernBertModel",
    hf=HF,
    variations={
        "biases": {"attention_bias": True, "mlp_bias": True, "norm_bias": True},
        "every third": {"global_attn_every_n_layers": 3, "pooling": "cls"},
    },
    published=PUBLISHED,
    faults={
        "window": {"local_attention": 26},
        "local theta": {"local_rope_theta": 11000.0},
        "global theta": {"global_rope_theta": 150000.0},
        "pattern": {"global_attn_every_n_layers": 3},
    },
    served=("biases",),
    vllm="modernbert:ModernBertModel",
    layer="encoder_layer",
    linears=r"Wqkv|Wi|Wo",
)
