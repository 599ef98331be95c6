"""The frequencies of rotary embeddings, for every scaling that Hugging Face configs name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcmodels.errors import ConfigError


class Request(NamedTuple):
    """What every scaling is computed from."""

    dim: int  # the rotated features of a head
    theta: float
    scaling: Mapping[str, Any]
    max_position: int | None
    seq_len: Tensor | int | None
    device: torch.device | None


class Kind(NamedTuple):
    """A scaling: its keys besides those every kind may have, and its formula."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    formula: Callable[[Request], tuple[Tensor, float]]


# Every config may repeat these: they are checked against theta and rotary_dim.
COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rope_frequencies(
    rotary_dim: int,
    *,
    theta: float,
    scaling: Mapping[str, Any] | None = None,
    max_position: int | None = None,
    seq_len: Tensor | int | None = None,
    device: torch.device | None = None,
) -> tuple[Float[Tensor, " half"], float]:
    """Radians per position of each rotated pair, and the factor of cos and sin.

    inv_freq_i = theta**(-2i / rotary_dim), changed as `scaling` says. Keys with value None count
    as absent. Only "dynamic" and "longrope" depend on seq_len, without a branch on its value.

    Args:
        rotary_dim: features rotated, an even number.
        theta: the base.
        scaling: a Hugging Face `rope_scaling` or `rope_parameters` dict of one layer type:
            `rope_type` (or `type`) in default, linear, dynamic, llama3, yarn, longrope, with
            that type's keys. None is default.
        max_position: the config's max_position_embeddings. Needed by dynamic, by longrope and
            yarn without `factor`, and where `original_max_position_embeddings` is left out.
        seq_len: largest position + 1; a Python int or a scalar tensor. None is a short one.
        device: of the result.
    Returns:
        inv_freq (rotary_dim // 2,) in float32, and the attention factor.
    Raises:
        ConfigError: unknown rope_type, unknown or missing keys, or values that disagree.
    Source: `transformers` 5.19, modeling_rope_utils; YaRN: Peng et al. 2023, arXiv:2309.00071;
        LongRoPE: Ding et al. 2024, arXiv:2402.13753.

    >>> rope_frequencies(4, theta=100.0)
    (tensor([1.0000, 0.1000]), 1.0)
    """
    scaling = {} if scaling is None else {k: v for k, v in scaling.items() if v is not None}
    kind = _kind(scaling)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            "rope: rotated features come in pairs",
            got=f"rotary_dim={rotary_dim}",
            need="an even number, at least 2",
            fix=f"rotary_dim={max(2, rotary_dim - rotary_dim % 2)}",
        )
    if scaling.get("rope_theta", theta) != theta:
        raise ConfigError(
            "rope: two values of theta",
            got=f"theta={theta}, scaling['rope_theta']={scaling['rope_theta']}",
            need="one value",
            fix=f"theta={scaling['rope_theta']}",
        )
    return kind.formula(Request(rotary_dim, theta, scaling, max_position, seq_len, device))


def _kind(scaling: Mapping[str, Any]) -> Kind:
    """The scaling's kind, once its keys are known to be those of the kind."""
    names = {str(scaling[key]) for key in ("rope_type", "type") if key in scaling}
    if len(names) > 1:
        raise ConfigError(
            "rope: rope_type and type disagree",
            got=f"rope_type={scaling['rope_type']!r}, type={scaling['type']!r}",
            need="one value",
            fix="leave out type, the old spelling",
        )
    name = names.pop() if names else "default"
    if name not in KINDS:
        raise ConfigError(
            f'rope: unknown rope_type "{name}"',
            got=f"scaling={dict(scaling)}",
            need=f"rope_type in {', '.join(KINDS)}",
            fix='rope_type="longrope"' if name == "su" else None,
        )
    kind = KINDS[name]
    missing = [key for key in kind.required if key not in scaling]
    known = (*kind.required, *kind.optional, *COMMON_KEYS)
    unknown = [key for key in scaling if key not in known]
    if missing or unknown:
        raise ConfigError(
            f'rope: the keys of scaling do not fit rope_type "{name}"',
            missing=", ".join(missing) or "none",
            unknown=", ".join(unknown) or "none",
            need=f"{', '.join(kind.required) or 'no key'}; optional: {', '.join(kind.optional)}"
            if kind.optional
            else ", ".join(kind.required) or "no key",
            fix="; ".join(
                [f"add {', '.join(missing)}"] * bool(missing)
                + [f"leave out {', '.join(unknown)}"] * bool(unknown)
            ),
        )
    return kind


def _powers(r: Request) -> Tensor:
    """2i / dim, (dim // 2,). float32 throughout, in transformers' order of operations."""
    return torch.arange(0, r.dim, 2, dtype=torch.int64, device=r.device).float() / r.dim


def _default(r: Request) -> tuple[Tensor, float]:
    return 1.0 / (r.theta ** _powers(r)), 1.0


def _linear(r: Request) -> tuple[Tensor, float]:
    return _default(r)[0] / _number(r, "factor"), 1.0


def _dynamic(r: Request) -> tuple[Tensor, float]:
    """NTK-aware: theta grows with the length, beyond max_position only."""
    factor, longest = _number(r, "factor"), _max_position(r)
    short, _ = _default(r)
    if r.seq_len is None:
        return short, 1.0
    seq_len = torch.as_tensor(r.seq_len, device=r.device)
    stretch = (factor * seq_len / longest) - (factor - 1)
    # Below max_position the base is negative or smaller, and not used: 1 keeps the power finite.
    stretch = torch.where(seq_len > longest, stretch, 1.0)
    theta = r.theta * stretch ** (r.dim / (r.dim - 2))
    return torch.where(seq_len > longest, 1.0 / (theta ** _powers(r)), short), 1.0


def _llama3(r: Request) -> tuple[Tensor, float]:
    """Long wavelengths divided by factor, short ones kept, a ramp between."""
    inv_freq, _ = _default(r)
    factor, original = _number(r, "factor"), _original(r)
    low, high = _number(r, "low_freq_factor"), _number(r, "high_freq_factor")
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    ramp = (1 - smooth) * scaled / factor + smooth * scaled
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, ramp, scaled), 1.0


def _yarn(r: Request) -> tuple[Tensor, float]:
    """Interpolation and extrapolation mixed by how often a pair turns in the original length."""
    original = _original(r)
    factor = _number(r, "factor") if "factor" in r.scaling else _max_position(r) / original
    mscale, mscale_all_dim = r.scaling.get("mscale"), r.scaling.get("mscale_all_dim")
    if "attention_factor" in r.scaling:
        attention = _number(r, "attention_factor")
    elif mscale and mscale_all_dim:
        attention = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    else:
        attention = _yarn_mscale(factor, 1)
    # `or` as in transformers, where 0 means the default as well.
    low = _yarn_pair(r, r.scaling.get("beta_fast") or 32, original)
    high = _yarn_pair(r, r.scaling.get("beta_slow") or 1, original)
    if r.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r.dim - 1)
    if low == high:
        high += 0.001
    place = torch.arange(r.dim // 2, dtype=torch.float32, device=r.device)
    kept = 1 - torch.clamp((place - low) / (high - low), 0, 1)
    turns = r.theta ** _powers(r)
    return 1.0 / (factor * turns) * (1 - kept) + 1.0 / turns * kept, attention


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_pair(r: Request, turns: float, original: float) -> float:
    """The (fractional) pair that turns so many times in the original length."""
    return r.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(r.theta))


def _longrope(r: Request) -> tuple[Tensor, float]:
    """One searched factor per pair, another set beyond the original length."""
    original = _original(r)
    factor = _number(r, "factor") if "factor" in r.scaling else _max_position(r) / original
    if "attention_factor" in r.scaling:
        attention = _number(r, "attention_factor")
    else:
        attention = 1.0
        if factor > 1:
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (_factors(r, key) for key in ("short_factor", "long_factor"))
    if r.seq_len is None:
        factors = short
    else:
        factors = torch.where(torch.as_tensor(r.seq_len, device=r.device) > original, long, short)
    return 1.0 / (factors * r.theta ** _powers(r)), attention


def _factors(r: Request, key: str) -> Tensor:
    """A list of one factor per pair."""
    values = r.scaling[key]
    if not isinstance(values, list | tuple) or len(values) != r.dim // 2:
        count = len(values) if isinstance(values, list | tuple) else repr(values)
        raise ConfigError(
            f"rope: {key} needs one factor per rotated pair",
            got=f"{count} for rotary_dim={r.dim}",
            need=f"a list of {r.dim // 2}",
            fix=f"rotary_dim={2 * len(values)}" if isinstance(values, list | tuple) else None,
        )
    return torch.tensor(list(values), dtype=torch.float32, device=r.device)


def _number(r: Request, key: str) -> float:
    value = r.scaling[key]
    if not isinstance(value, int | float):
        raise ConfigError(f"rope: {key} is no number", got=repr(value), need="a number")
    return value


def _original(r: Request) -> float:
    """The length of pretraining, which transformers takes from the config where it is left out."""
    value = r.scaling.get("original_max_position_embeddings", r.max_position)
    if not isinstance(value, int | float):
        raise _needs_max_position(r, "original_max_position_embeddings")
    return value


def _max_position(r: Request) -> int:
    if r.max_position is None:
        raise _needs_max_position(r, "max_position_embeddings")
    return r.max_position


def _needs_max_position(r: Request, what: str) -> ConfigError:
    name = r.scaling.get("rope_type", r.scaling.get("type", "default"))
    return ConfigError(
        f'rope: rope_type "{name}" needs {what}',
        got=f"max_position=None, scaling={dict(r.scaling)}",
        need=what,
        fix="max_position=cfg.max_position_embeddings",
    )


KINDS: dict[str, Kind] = {
    "default": Kind((), (), _default),
    "linear": Kind(("factor",), (), _linear),
    "dynamic": Kind(("factor",), ("original_max_position_embeddings",), _dynamic),
    "llama3": Kind(
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
        _llama3,
    ),
    "yarn": Kind(
        (),
        (
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
        _yarn,
    ),
    "longrope": Kind(
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
        _longrope,
    ),
}
