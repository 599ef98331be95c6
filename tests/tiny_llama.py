"""A tiny Llama for the tests: its config, its model, and weights that leave no logit near zero."""

from __future__ import annotations

from typing import Any

import torch

import funcmodels as fm
from funcmodels.models import llama
from funcmodels.parts import stored_tensors_of

HF: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def tiny(**changes: Any) -> fm.Model:
    """The model of HF with some fields changed."""
    return llama.model(llama.Config.from_hf({**HF, **changes}))


def weights_of(
    model: fm.Model, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.3
) -> Any:
    """Weights 1.3 times the usual size; norms and biases are no ones and zeros either."""

    def shift(path: str, value: torch.Tensor) -> torch.Tensor:
        is_drawn = bool((value != value.flatten()[0]).any())  # norms of heads are no matrices
        if value.dim() > 1 and is_drawn:
            return scale * value
        generator = torch.Generator().manual_seed(hash_of(path))
        return value + 0.3 * torch.randn(value.shape, generator=generator)

    drawn = fm.tree.map_with_path(shift, fm.init(model, seed=seed))
    return fm.tree.map(lambda value: value.to(dtype), drawn)


def hash_of(path: str) -> int:
    """A small seed from a path."""
    return sum(map(ord, path))


def state_dict(model: fm.Model, weights: Any) -> dict[str, torch.Tensor]:
    """Weights, or gradients, under the names of the checkpoint."""
    return dict(stored_tensors_of(model.tensor_maps, dict(fm.tree.items(weights))))
