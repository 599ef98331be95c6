"""Reading a Hugging Face config.json without guessing: what every zoo model has in common.

A field that a model file does not know may change what the model computes, so it is refused;
fields known to change nothing about it are listed here.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from funcmodels.errors import ConfigError, listed

# Bookkeeping, training and generation settings: none of them reaches the forward pass.
INERT = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures auto_map dtype id2label
    initializer_range is_encoder_decoder
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

# How the folder's tensors are stored: no part of the function, and the engine's affair.
QUANTISED = "quantization_config"
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # names of their number

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

_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
         "original_max_position_embeddings")  # fmt: skip


def unless_given(value: Callable[[Mapping[str, Any]], Any]) -> Any:
    """A field that a config.json may leave out: then it is computed from the other fields.

    Args:
        value: of config.json, whose required fields are there.
    """
    return field(metadata={"unless_given": value})


@dataclass(frozen=True, kw_only=True)
class ZooConfig:
    """The base of every zoo model's `Config`: reads a config.json, and writes it again.

    A subclass declares its fields under Hugging Face's names. One without a default is required,
    one with a default or with `unless_given` is not; null is None where the type has None.
    `rope_theta` and `rope_scaling`, where it has them, are read in both spellings of transformers;
    lists become tuples, so that it is hashable.

    Attributes:
        MODEL_TYPE: `model_type` of config.json.
        ONLY: field -> the values that the model file implements; others are refused.
        READS: fields that only `unless_given` and `plain` look at.
        LAYER_TYPES: what a field `layer_types` may hold.
        LEAST_EXPERTS: how few a model of experts may have; 0 where it is then one without.
        hf: the mapping it was read from.
    """

    MODEL_TYPE: ClassVar[str]
    ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    READS: ClassVar[tuple[str, ...]] = ()
    LAYER_TYPES: ClassVar[tuple[str, ...]] = ("full_attention", "sliding_attention")
    LEAST_EXPERTS: ClassVar[int] = 1

    hf: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_heads(vars(self))
        _check_layer_types(vars(self), self.LAYER_TYPES)
        _check_experts(vars(self), self.LEAST_EXPERTS)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The config that a `config.json` describes; the mapping is kept as `hf`.

        A quantised checkpoint's describes the same function, which the engine computes from that
        folder; it is kept without its `quantization_config`, since `fm.save` writes other tensors.

        Raises:
            ConfigError: a field this model does not know, a value it does not support, or a size
                that is missing.
        """
        model = f"models.{cls.__module__.rpartition('.')[2]}"
        hf = {key: value for key, value in hf.items() if key != QUANTISED}
        own = {f.name: f for f in dataclasses.fields(cls) if f.name != "hf"}
        only = {"model_type": (cls.MODEL_TYPE,), **cls.ONLY}
        rope = _ROPE if "rope_theta" in own else ()
        plain = cls.plain(hf)
        if "partial_rotary_factor" in own:
            plain = partial_outside(plain)
        check_fields(plain, model=model, known={*own, *only, *cls.READS, *rope})
        check_values(plain, model=model, only=only)
        required = [n for n, f in own.items() if f.default is dataclasses.MISSING
                    and not f.metadata and n not in rope]  # fmt: skip
        check_present(plain, model=model, required=required)
        values = {n: _value_of(f, plain) for n, f in own.items() if n not in rope[:2]}
        if rope:
            whole = {k: v for k, v in plain.items() if k != "partial_rotary_factor" or k not in own}
            theta, scaling = rope_of(whole, model=model)
            values |= {"rope_theta": theta, "rope_scaling": scaling}
        return cls(**values, hf=hf)

    @classmethod
    def plain(cls, hf: Mapping[str, Any]) -> Mapping[str, Any]:
        """`hf` in the spelling of the fields: for a model whose config.json has had several."""
        return hf

    def to_hf(self) -> dict[str, Any]:
        """config.json: the one it was read from, or, where fields differ, one made from them."""
        if self.hf is not None and type(self).from_hf(self.hf) == self:
            return {"model_type": self.MODEL_TYPE, **self.hf}
        kept = {key: v for key, v in (self.hf or {}).items() if key in INERT}
        fixed = {key: v[0] for key, v in self.ONLY.items() if v[0] is not None}
        return {**kept, "model_type": self.MODEL_TYPE, **fixed, **self.written()}

    def written(self) -> dict[str, Any]:
        """The fields as config.json spells them."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "hf"}
        if "rope_theta" in own:
            own |= rope_to_hf(own.pop("rope_theta"), own.pop("rope_scaling"))
            if "partial_rotary_factor" in own:
                factor = own.pop("partial_rotary_factor")
                own["rope_parameters"] |= {"partial_rotary_factor": factor}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in own.items()}


def labels_of(hf: Mapping[str, Any]) -> int:
    """How many labels a classifier has: config.json names each, and transformers takes 2 for none.

    Transformers keeps no `num_labels` where it has the names.
    """
    return len(hf.get("id2label") or "no")


def _value_of(own: dataclasses.Field[Any], hf: Mapping[str, Any]) -> Any:
    """What config.json says of a field, or what it is without."""
    if hf.get(own.name) is not None:
        return _hashable(hf[own.name])
    if own.name in hf and "None" in str(own.type):
        return None  # null: another thing than to leave a field out
    return own.metadata["unless_given"](hf) if own.metadata else own.default


def _check_heads(cfg: Mapping[str, Any]) -> None:
    """Query heads divide over the key-value heads, and heads into pairs that rope turns.

    Raises:
        ConfigError: they do not.
    """
    heads, kv_heads = cfg.get("num_attention_heads"), cfg.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise ConfigError(
            "query heads cannot be grouped over the key-value heads",
            got=f"num_attention_heads={heads}, num_key_value_heads={kv_heads}",
            need="num_key_value_heads divides num_attention_heads",
            fix=f"num_key_value_heads={heads}",
        )
    if "rope_theta" in cfg and cfg.get("head_dim", 0) % 2:
        raise ConfigError(
            "rotary embeddings turn pairs of dims",
            got=f"head_dim={cfg['head_dim']}",
            need="an even head_dim",
            fix=f"head_dim={cfg['head_dim'] + 1}",
        )


def _check_experts(cfg: Mapping[str, Any], least: int) -> None:
    """Enough experts, of which each token takes some.

    Raises:
        ConfigError: there are too few, or none is taken.
    """
    name = next((key for key in EXPERTS if key in cfg), None)
    taken = cfg.get("num_experts_per_tok")
    if name is None or taken is None or cfg[name] == 0 == least:
        return
    if not 0 < taken <= cfg[name]:
        raise ConfigError(
            "tokens cannot take so many experts",
            got=f"{name}={cfg[name]}, num_experts_per_tok={taken}",
            need=f"num_experts_per_tok from 1 to {name}",
            fix=f"num_experts_per_tok={cfg[name]}"
            if cfg[name] > 0 and taken > 0
            else f"the numbers of the checkpoint: {name}=8, num_experts_per_tok=2, say",
        )


def _check_layer_types(cfg: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """One known type for each layer, and a window where one needs it.

    Raises:
        ConfigError: another number of types, an unknown one, or a window that is missing.
    """
    if (types := cfg.get("layer_types")) is None:
        return
    layers = cfg["num_hidden_layers"]
    if len(types) != layers:
        raise ConfigError(
            "layer_types names another number of layers than there are",
            got=f"{len(types)} layer_types, num_hidden_layers={layers}",
            need="one type for each layer",
            fix=f"layer_types[:{layers}]"
            if len(types) > layers
            else f"add {layers - len(types)} more",
        )
    if unknown := sorted({*types} - {*allowed}):
        raise ConfigError(
            "layer_types names a type of layer that this model has not",
            got=listed(unknown),
            need=" or ".join(allowed),
            fix="write a model file that handles it",
        )
    if "sliding_attention" in types and not cfg.get("sliding_window", True):
        raise ConfigError(
            "a layer attends within a window of no size",
            got=f"sliding_attention in layer_types, sliding_window={cfg['sliding_window']}",
            need="sliding_window=, in tokens",
            fix='"sliding_window": 4096 in config.json, or full_attention in layer_types',
        )


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
    unknown = [
        key
        for key, value in hf.items()
        if key not in INERT and key not in known and key != QUANTISED and value is not None
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
            fix="write a model file whose Config has partial_rotary_factor",
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


def partial_outside(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """`hf` with the share of rotated features as a field of its own, wherever it stood.

    Raises:
        ConfigError: two values of it.
    """
    found, key = dict(hf), "partial_rotary_factor"
    for name in ("rope_parameters", "rope_scaling"):
        rope = dict(hf.get(name) or {})
        if (factor := rope.pop(key, None)) is not None:
            if found.get(key) not in (None, factor):
                raise ConfigError(
                    f"two values of {key}",
                    got=f"{found[key]}, and {factor} in {name}",
                    need="one value",
                    fix=f"keep {name} alone",
                )
            found |= {key: factor, name: rope or None}
    return found


def rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The inverse of `rope_of`, in the spelling of transformers 5."""
    rope = {key: list(v) if isinstance(v, tuple) else v for key, v in scaling or ()}
    return {"rope_parameters": {"rope_type": "default", **rope, "rope_theta": theta}}


def _hashable(value: Any) -> Any:
    """Lists as tuples; transformers writes an infinite number as {"__float__": "Infinity"}."""
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return value
