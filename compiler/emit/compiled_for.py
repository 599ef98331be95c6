"""The config.json that an emitted file was compiled for, which it compares with the folder's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compiler.emit.text import literal, quoted
from funcmodels.config_json import config_of_fields
from funcmodels.models.hf_config import INERT
from funcmodels.spec import Model

# Fields of config.json that decide what a model computes, where a model has them.
_STRUCTURE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "hidden_act", "rope_theta",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "layer_types",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
# Fields of a config that a folder may have otherwise: it may be made for longer sequences.
_MAY_DIFFER = {*INERT, "max_position_embeddings", "original_max_position_embeddings"}


def compiled_for(model: Model) -> dict[str, str]:
    """The fields of `COMPILED_FOR`, as far as they decide the values: name -> value, as source."""
    config = config_of_fields(model)
    own = _own_fields(model, config)
    found = {k: config[k] for k in _STRUCTURE if config.get(k) is not None}
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope |= {k: own.pop(k) for k in ("rope_theta", "partial_rotary_factor") if k in own}
    found |= {k: v for k, v in own.items() if k not in found}
    found |= {k: rope.pop(k) for k in ("rope_theta",) if k in rope}
    if rope or "rope_theta" in found:
        rope_type = rope.pop("type", "default")
        rope = {k: v for k, v in rope.items() if v is not None}
        found["rope_parameters"] = {"rope_type": rope_type, **rope}
    return {quoted(k): literal(v) for k, v in found.items()}


def _own_fields(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the model's own config, where it describes a config.json of others.

    One that reads them has their defaults for what such a file leaves out.
    """
    own = model.config
    if model.hf_config is None or not dataclasses.is_dataclass(own):
        return {}
    values = {f.name: getattr(own, f.name) for f in dataclasses.fields(own)}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (bool, int, float, str))
        and name not in _MAY_DIFFER
        and (name in config or hasattr(own, "from_hf"))
    }
