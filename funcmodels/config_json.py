"""config.json of a model: the one it was made for, or one that vLLM accepts, built from it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funcmodels.errors import ConfigError, listed
from funcmodels.spec import Model

# What vLLM reads of any model, and the axis whose size it is.
_AXIS_OF = {
    "vocab_size": "vocab",
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "positions",
}


# The same, read the other way, and the sizes that only messages speak of.
FIELD_OF_AXIS = {axis: field for field, axis in _AXIS_OF.items()} | {"mlp": "intermediate_size"}


def config_json(model: Model, values: Mapping[str, Tensor]) -> dict[str, Any]:
    """What to write as config.json for these weights.

    Args:
        values: the weights by path; `dtype` is that of most of their elements.
    Raises:
        ConfigError: a field that vLLM needs can be derived neither from the config nor from the
            declared axes, or the config holds something that JSON cannot.
    """
    body = config_of(model)
    sizes: Counter[str] = Counter()
    for value in values.values():
        sizes[str(value.dtype).removeprefix("torch.")] += value.numel()
    dtype = sizes.most_common(1)[0][0]
    if "torch_dtype" in body:  # the older spelling: kept, so that the two never disagree
        body["torch_dtype"] = dtype
    names = [model.name, *model.hf_architectures]
    return {**body, "architectures": names, "dtype": dtype}


def config_of(model: Model) -> dict[str, Any]:
    """The fields of config.json that do not depend on the weights."""
    return dict(model.hf_config) if model.hf_config is not None else _built(model)


def config_of_fields(model: Model) -> dict[str, Any]:
    """What is known of config.json without asking for more: nothing need be derivable."""
    return dict(model.hf_config) if model.hf_config is not None else _fields(model)


def _built(model: Model) -> dict[str, Any]:
    """A config of the model's own fields, and those that vLLM reads."""
    own = _fields(model)
    axes = {a: n for p in model.by_path.values() for a, n in zip(p.axes, p.shape, strict=True)}
    if depth := _depth(model):
        axes.setdefault("layers", depth)
    known = {name: own.get(name, axes.get(axis)) for name, axis in _AXIS_OF.items()}
    if known["num_key_value_heads"] is None:
        known["num_key_value_heads"] = known["num_attention_heads"]
    if known["head_dim"] is None and known["hidden_size"] and known["num_attention_heads"]:
        known["head_dim"] = known["hidden_size"] // known["num_attention_heads"]
    if missing := [name for name, value in known.items() if value is None]:
        raise ConfigError(
            f"config.json of {model.name} would lack {listed(missing)}",
            got=f"config fields {listed(own)}; axes {listed(axes)}",
            need="the fields that vLLM reads of any model, or axes that give their sizes",
            fix=f"add {missing[0]}=... to the config, or pass hf_config= to fm.Model",
        )
    tables = sum("vocab" in param.axes for param in model.by_path.values())
    tied = tables == 1 and model.task == "generate"
    counts = [axes[axis] for axis, mesh in model.table.items() if mesh == "ep"]
    mixed = {"num_experts": counts[0]} if counts else {}
    return {"model_type": "funcmodels", **known, "tie_word_embeddings": tied, **mixed, **own}


def _fields(model: Model) -> dict[str, Any]:
    """The fields of the user's config, as JSON holds them."""
    config = model.config
    if dataclasses.is_dataclass(config):
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    elif isinstance(config, Mapping):
        fields = dict(config)
    elif config is None:
        fields = {}
    else:
        raise ConfigError(
            f"the config of {model.name} cannot be written to config.json",
            got=type(config).__name__,
            need="a dataclass or a mapping",
            fix="pass hf_config= to fm.Model",
        )
    for name, value in fields.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ConfigError(
                f'config field "{name}" of {model.name} cannot be written to config.json',
                got=f"{type(value).__name__}: {value!r}",
                need="numbers, text, booleans, lists and mappings of them",
                fix=f"store {name} as text, or pass hf_config= to fm.Model",
            ) from None
    return fields


def _depth(model: Model) -> int:
    """The length of the list at `layers`."""
    found = {path.split(".")[1] for path in model.by_path if path.startswith("layers.")}
    return len(found)
