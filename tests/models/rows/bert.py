"""BERT as an encoder of sentences."""

from typing import Any

from tests.models.zoo import Published, Row

HF: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "pooling": "mean",
    "normalize": True,
}

SHARED: dict[str, Any] = {
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
# Source: none was found; by their numbers of parameters alone, and MiniLM by its own weights.
PUBLISHED = {  # without BERT's own pooler, (hidden + 1) * hidden, which embeddings do not use
    "all-MiniLM-L6-v2": Published(
        SHARED
        | {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "pooling": "mean",
            "normalize": True,
        },
        22_713_216 - 385 * 384,
    ),
    "bge-base-en-v1.5": Published(
        SHARED
        | {
            "classifier_dropout": None,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "pooling": "cls",
            "normalize": True,
        },
        109_482_240 - 769 * 768,
    ),
}

ROW = Row(
    module="bert",
    architecture="BertModel",
    hf=HF,
    variations={
        "cls": {"pooling": "cls"},
        "last, not normalised": {"pooling": "last", "normalize": False},
        "one type": {"type_vocab_size": 1},
    },
    published=PUBLISHED,
    faults={"eps": {"layer_norm_eps": 1e-2}},
    served=("cls", "one type"),
    vllm="bert:BertEmbeddingModel",
    layer="encoder_layer",
    linears=r"encoder.*dense",
)
