"""Whether the engine caches the latents of a model, or the keys and values made from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# What a config.json says of latents, in the spelling that the engine reads.
FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
# The engine goes by model_type: of these, among others that no model of the zoo has.
TYPES = ("deepseek_v2", "deepseek_v3")
SIZE = 576  # of a latent and its rope key, the one that each device has a kernel for


def has_latent(config: Mapping[str, Any]) -> bool:
    """Whether a config of no published model speaks of latents that every engine can cache."""
    if any(config.get(name) is None for name in FIELDS):
        return False
    return config["kv_lora_rank"] + config["qk_rope_head_dim"] == SIZE


def caches_latent(config: Mapping[str, Any]) -> bool:
    """Whether the engine, in this environment, caches latents for a model with this config.json."""
    if os.environ.get("VLLM_MLA_DISABLE", "0") not in ("", "0"):
        return False
    kind = config.get("model_type", "funcmodels")
    if kind == "funcmodels":
        return has_latent(config)
    return kind in TYPES and config.get("kv_lora_rank") is not None


def cached_of_latent(config: Mapping[str, Any], rank: int, rope: int) -> tuple[int, str]:
    """Elements that are cached of a token's latent and rope key, and what to say of it.

    None where keys and values are cached: then what to say lacks how wide they are.
    """
    if caches_latent(config):
        return rank + rope, f"a latent of {rank} and a rope key of {rope}, whole on each rank"
    return 0, "keys and values of each head, {} wide: for this config, vLLM caches no latents"
