"""Multi-head attention whose keys and values are made from a small latent: MLA."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.ops.attention import attention
from funcmodels.ops.einsum import einsum
from funcmodels.ops.primitive import primitive


@primitive
def latent_attention(
    q_nope: Float[Tensor, "*batch seq heads nope"],
    q_rope: Float[Tensor, "*batch seq heads rope"],
    latent: Float[Tensor, "*batch seq rank"],
    k_rope: Float[Tensor, "*batch seq 1 rope"],
    kv_up: Float[Tensor, "heads nope_and_dv rank"],
    *,
    scale: float | None = None,
    segment_ids: Int[Tensor, "*batch seq"] | None = None,
) -> Float[Tensor, "*batch seq heads dv"]:
    """Causal attention to keys and values that each head makes from one latent of a token.

    k_nope, v = split(kv_up_h @ latent, [nope, dv])
    out = attention([q_nope, q_rope], [k_nope, k_rope], v), with one k_rope for all heads

    The values are those of `attention` on the expanded keys and values, and so are its
    derivatives. Served, the latent and k_rope are what is cached, where the engine can: rank +
    rope features for each token, instead of heads * (nope + rope + dv).

    Args:
        q_nope: the part of the queries without positions.
        q_rope: the part with them, after `ops.rope`.
        latent: what keys and values are made from, normalised if the model does that.
        k_rope: the keys' part with positions, after `ops.rope`: one head that all share.
        kv_up: for each head, the rows that make the keys, then those that make the values.
        scale: of the scores; (nope + rope)**-0.5 unless given.
        segment_ids: keys are visible only to queries with the same id: packed sequences.
    Returns:
        (*batch, seq, heads, dv), dtype of q_nope.
    Raises:
        ShapeError: shapes that do not fit.
    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; `transformers` modeling_deepseek_v3.
    """
    _check(q_nope, q_rope, latent, k_rope, kv_up)
    heads, nope = q_nope.shape[-2:]
    kv = einsum(latent, kv_up, "... r, h d r -> ... h d")  # (*batch, seq, heads, nope + dv)
    k_nope, v = kv.split([nope, kv.shape[-1] - nope], dim=-1)
    shared = k_rope.expand(*k_rope.shape[:-2], heads, k_rope.shape[-1])
    q, k = torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, shared), dim=-1)
    return attention(q, k, v, scale=scale, segment_ids=segment_ids)


def _check(q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, kv_up: Tensor) -> None:
    """The operands fit together."""
    if q_nope.dim() < 3 or q_nope.shape[:-1] != q_rope.shape[:-1]:
        raise ShapeError(
            "latent_attention: q_nope and q_rope are not two parts of the same queries",
            got=_shapes(q_nope=q_nope, q_rope=q_rope),
            need="q_nope (*batch, seq, heads, nope), q_rope (*batch, seq, heads, rope)",
            fix="q_nope, q_rope = q.split([nope, rope], dim=-1) of q (*batch, seq, heads, d)",
        )
    tokens, rope = q_nope.shape[:-2], q_rope.shape[-1]
    if k_rope.shape != (*tokens, 1, rope):
        raise ShapeError(
            "latent_attention: k_rope is not one head for each token, as wide as q_rope",
            got=_shapes(k_rope=k_rope, q_rope=q_rope),
            need=f"k_rope {(*tokens, 1, rope)}",
            fix="k_rope.unsqueeze(-2)"
            if k_rope.shape == (*tokens, rope)
            else f"project it to {rope} features a token, without heads, and k_rope.unsqueeze(-2)",
        )
    if latent.shape[:-1] != tokens:
        raise ShapeError(
            "latent_attention: latent needs one vector for each token",
            got=_shapes(latent=latent, q_nope=q_nope),
            need=f"latent {(*tokens, 'rank')}",
            fix="project it without heads: x @ w.T of w (rank, hidden)",
        )
    heads, nope = q_nope.shape[-2:]
    if kv_up.dim() != 3 or kv_up.shape[::2] != (heads, latent.shape[-1]) or kv_up.shape[1] <= nope:
        raise ShapeError(
            "latent_attention: kv_up does not make keys and values from the latent",
            got=_shapes(kv_up=kv_up, latent=latent, q_nope=q_nope),
            need=f"kv_up ({heads}, {nope} + dv, {latent.shape[-1]})",
            fix='declare it as P("heads nope_and_v rank"), with the rows of the keys first',
        )


def _shapes(**tensors: Tensor) -> str:
    """Names and shapes, for a message."""
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
