"""Folders as they are published, with small random weights: with a head, or with images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models.zoo import rows

IMAGES = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 255,
    "boi_token_index": 254,
    "eoi_token_index": 253,
}


def published(architecture: str, folder: Path, **fields: Any) -> Any:
    """A random model of transformers, saved in a folder."""
    import transformers  # where tests of the engine are collected, it would leave a log open

    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    peer = kind._from_config(kind.config_class(**fields), dtype=torch.float32).eval()
    for parameter in peer.parameters():
        parameter.data.normal_(std=0.1).add_(parameter.dim() == 1)
    peer.save_pretrained(folder)
    return peer


def fields_of(row: str) -> dict[str, Any]:
    own = ("model_type", "pooling", "normalize")
    return {key: value for key, value in rows()[row].fields().items() if key not in own}
