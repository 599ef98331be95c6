"""Reading a Hugging Face config.json without guessing: what every zoo model has in common.

A field that a model file does not know may change what the model computes, so it is refused;
fields known to change nothing about it are listed here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from funcmodels.errors import ConfigError, listed

# Bookkeeping, training and generation settings: none of them reaches the forward pass.
INERT = frozenset(
    """
    _name_or_path architectures auto_map dtype id2label initializer_range is_encoder_decoder
    is_llama_config label2id max_sequence_length model_type problem_type
    torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache
    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    chunk_size_feed_forward output_attentions output_hidden_states output_scores return_dict
    return_dict_in_generate torchscript use_return_dict
    finetuning_task prefix task_specific_params tokenizer_class
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences remove_invalid_values repetition_penalty suppress_tokens
    temperature tf_legacy_loss top_k top_p typical_p use_bfloat16
    """.split()  # noqa: SIM905 (a list of 60 lines reads worse)
)

# The fields of each rotary scaling: those it needs, and those it may have.
_ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("attention_factor", "factor"),
    ),
}

RopeScaling = tuple[tuple[str, Any], ...]


def check_fields(hf: Mapping[str, Any], *, model: str, known: Iterable[str]) -> None:
    """Refuse the fields that a model file does not know.

    Args:
        hf: config.json as a mapping.
        model: name of the model file, for the message.
        known: the fields that it reads.
    Raises:
        ConfigError: an unknown field that is set to something.
    """
    known = [*known]
    if hf.get("quantization_config") is not None:
        quantization = hf["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise ConfigError(
            f"{model} does not read quantised checkpoints",
            got=f"quantization_config of method {method!r}",
            need="floating-point weights",
            fix="load the checkpoint that it was quantised from",
        )
    unknown = [
        key
        for key, value in hf.items()
        if key not in INERT
        and key not in known
        and key != "quantization_config"
        and value is not None
    ]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ConfigError(
            f"{model} does not know {len(unknown)} of the {len(hf)} fields of this config",
            got=listed(f"{key}={hf[key]!r}" for key in unknown),
            need="fields whose meaning the model file knows, since one may change the result",
            fix=f'did you mean "{near[0]}"?'
            if near
            else f"drop {unknown[0]} if it changes nothing, or write a model file that handles it",
        )


def check_values(hf: Mapping[str, Any], *, model: str, only: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a field whose value is none of those that the model file implements.

    Raises:
        ConfigError: another value; None and a missing field pass.
    """
    for key, allowed in only.items():
        if hf.get(key) is not None and hf[key] not in allowed:
            raise ConfigError(
                f"{model} does not support this {key}",
                got=f"{key}={hf[key]!r}",
                need=" or ".join(repr(value) for value in allowed),
                fix="write a model file that handles it: start from a copy of "
                f"funcmodels/models/{model.rpartition('.')[2]}.py",
            )


def check_present(hf: Mapping[str, Any], *, model: str, required: Iterable[str]) -> None:
    """Refuse a config that lacks a field for which no default would be right.

    Raises:
        ConfigError: naming every missing field.
    """
    if missing := [key for key in required if hf.get(key) is None]:
        raise ConfigError(
            f"this config lacks {len(missing)} fields that {model} needs",
            got=f"fields {listed(sorted(hf))}",
            need=listed(missing),
            fix=f'add "{missing[0]}" to config.json',
        )


def rope_of(hf: Mapping[str, Any], *, model: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, in the spelling of transformers 4 or of 5.

    4 has `rope_theta` and `rope_scaling`, 5 has `rope_parameters` with the base inside.

    Args:
        hf: config.json as a mapping.
        model: name of the model file, for the message.
    Returns:
        The base, and the scaling as sorted (field, value) pairs, hashable; None without scaling.
    Raises:
        ConfigError: the two spellings disagree, an unknown type, an unknown or missing field.
    Source: transformers `RotaryEmbeddingConfigMixin`.
    """
    old, new = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    rope = {k: v for k, v in {**new, **old}.items() if v is not None}
    rope_type = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    top_level = {"rope_theta": hf.get("rope_theta")}
    disagree = [
        key
        for key in {*old, *new, *top_level}
        if len({repr(d[key]) for d in (old, new, top_level) if d.get(key) is not None}) > 1
    ]
    if disagree:
        raise ConfigError(
            "rope_scaling, rope_parameters and rope_theta of this config disagree",
            got=f"two values of {listed(sorted(disagree))}",
            need="one value of each",
            fix="keep rope_parameters alone",
        )
    theta = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    if rope_type not in _ROPE_FIELDS:
        raise ConfigError(
            f"{model} does not support this rope_type",
            got=repr(rope_type),
            need=f"one of {', '.join(_ROPE_FIELDS)}",
            fix="write a model file that handles it",
        )
    required, optional = _ROPE_FIELDS[rope_type]
    if rope.pop("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ConfigError(
            f"{model} rotates whole heads",
            got="a partial_rotary_factor below 1",
            need="no partial_rotary_factor",
            fix="write a model file that passes rotary_dim to ops.rope",
        )
    if "original_max_position_embeddings" in required:
        # transformers' order: the config's own field first, then the rope field, then the length.
        outer = hf.get("original_max_position_embeddings")
        inner = rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = outer or inner or hf["max_position_embeddings"]
    missing = [key for key in required if key not in rope]
    unknown = [key for key in rope if key not in required and key not in optional]
    if missing or unknown:
        raise ConfigError(
            f'rotary scaling "{rope_type}" has other fields than it should',
            got=f"unknown {listed(unknown)}; missing {listed(missing)}",
            need=f"{listed(required)}, and possibly {listed(optional)}",
            fix=f"drop {unknown[0]}" if unknown else f"add {missing[0]}",
        )
    if rope_type == "default":
        return theta, None
    items = {"rope_type": rope_type, **rope}
    return theta, tuple((k, _hashable(v)) for k, v in sorted(items.items()))


def rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The inverse of `rope_of`, in the spelling of transformers 5."""
    rope = {key: list(v) if isinstance(v, tuple) else v for key, v in scaling or ()}
    return {"rope_parameters": {"rope_type": "default", **rope, "rope_theta": theta}}


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
