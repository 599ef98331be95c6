"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.ops.primitive import primitive
from funcmodels.ops.rope_frequencies import rope_frequencies


@primitive
def rope(
    q: Float[Tensor, "*batch seq heads head_dim"],
    k: Float[Tensor, "*batch seq kv_heads head_dim"],
    positions: Int[Tensor, "*batch seq"],
    *,
    theta: float,
    scaling: Mapping[str, Any] | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    max_position: int | None = None,
) -> tuple[
    Float[Tensor, "*batch seq heads head_dim"], Float[Tensor, "*batch seq kv_heads head_dim"]
]:
    """Rotate pairs of features by an angle proportional to the position.

    (a, b) -> (a cos - b sin, b cos + a sin) at angle position * inv_freq_i, for pair i; a and b
    are features i and i + rotary_dim / 2, or 2i and 2i + 1 if interleaved. cos and sin are taken
    in float32 and rounded to x's dtype, in which the products are.

    Args:
        q, k: queries and keys; any number of heads each.
        positions: (*batch, seq), the place of each token in its sequence.
        theta: base of the frequencies; no default, since models differ.
        scaling: a Hugging Face rope dict, see `rope_frequencies`. "dynamic" and "longrope" look
            at the largest position of the whole call.
        rotary_dim: features rotated, the first of each head; head_dim unless given here or as
            scaling's partial_rotary_factor.
        interleaved: pairs are neighbours (GPT-J, GLM) instead of halves (GPT-NeoX, Llama).
        max_position: the config's max_position_embeddings, where the scaling needs it.
    Returns:
        q and k, rotated, in their shapes and dtypes.
    Raises:
        ShapeError: shapes that do not fit, or rotary_dim above head_dim.
        ConfigError: see `rope_frequencies`.
    Source: Su et al. 2021, arXiv:2104.09864; `transformers` modeling_llama, modeling_gptj.
    """
    _check(q, k, positions)
    rotary_dim = _rotary_dim(q.shape[-1], rotary_dim, scaling)
    inv_freq, factor = rope_frequencies(
        rotary_dim,
        theta=theta,
        scaling=scaling,
        max_position=max_position,
        seq_len=positions.max() + 1 if _depends_on_length(scaling) else None,
        device=q.device,
    )
    # fp32: bf16 rounds position 257 to 256.
    angle = positions[..., None, None].float() * inv_freq  # (*batch, seq, 1, rotary_dim / 2)
    cos, sin = angle.cos() * factor, angle.sin() * factor
    if interleaved:
        cos, sin = (torch.stack(pair, dim=-1).flatten(-2) for pair in ((cos, cos), (-sin, sin)))
    else:
        cos, sin = (torch.cat(pair, dim=-1) for pair in ((cos, cos), (-sin, sin)))
    return (
        _rotate(q, cos.to(q.dtype), sin.to(q.dtype), interleaved),
        _rotate(k, cos.to(k.dtype), sin.to(k.dtype), interleaved),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first features of x rotated, the rest kept; of a pair's two sines, the first is negative.

    Whole rows at a time: halves of them take a CPU a third longer.
    """
    rotary_dim = cos.shape[-1]
    turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        other = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        other = torch.cat((b, a), dim=-1)
    turned = turned * cos + other * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def _depends_on_length(scaling: Mapping[str, Any] | None) -> bool:
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type")
    return kind in ("dynamic", "longrope")


def _rotary_dim(head_dim: int, rotary_dim: int | None, scaling: Mapping[str, Any] | None) -> int:
    """The number of rotated features, which may be said in two places."""
    fraction = (scaling or {}).get("partial_rotary_factor")
    said = None if fraction is None else int(head_dim * fraction)
    if rotary_dim is None:
        rotary_dim = head_dim if said is None else said
    if said not in (None, rotary_dim):
        raise ShapeError(
            "rope: two values of rotary_dim",
            got=f"rotary_dim={rotary_dim}, scaling['partial_rotary_factor']={fraction} "
            f"of head_dim={head_dim}",
            need="one value",
            fix=f"rotary_dim={said}",
        )
    if rotary_dim > head_dim:
        raise ShapeError(
            "rope: more features to rotate than a head has",
            got=f"rotary_dim={rotary_dim}, head_dim={head_dim}",
            need="rotary_dim <= head_dim",
            fix=f"rotary_dim={head_dim}",
        )
    return rotary_dim


def _check(q: Tensor, k: Tensor, positions: Tensor) -> None:
    """q, k and positions fit together."""
    if min(q.dim(), k.dim()) < 3 or q.shape[-1] != k.shape[-1] or q.shape[:-2] != k.shape[:-2]:
        raise ShapeError(
            "rope: q and k differ in more than their heads",
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, positions {tuple(positions.shape)}",
            need="q (*batch, seq, heads, head_dim), k (*batch, seq, kv_heads, head_dim)",
            fix='project both with "... e, h d e -> ... h d", of one head_dim',
        )
    if positions.shape != q.shape[:-2]:
        swapped = q.dim() - 2 == positions.dim() and positions.shape[-1] == q.shape[-2]
        sizes = ", ".join(map(str, q.shape[:-2]))
        raise ShapeError(
            "rope: positions needs one place per token",
            got=f"q {tuple(q.shape)}, k {tuple(k.shape)}, positions {tuple(positions.shape)}",
            need=f"positions ({sizes})",
            fix="heads come after seq here: q.transpose(-3, -2), and k alike"
            if swapped
            else f"positions.expand({sizes})",
        )
