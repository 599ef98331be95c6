"""The state-space layer of Mamba-2."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.ops.linear_attention import gated_linear_attention


def ssd(
    x: Float[Tensor, "*batch seq heads head_dim"],
    dt: Float[Tensor, "*batch seq heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "*batch seq groups state"],
    C: Float[Tensor, "*batch seq groups state"],
    *,
    D: Float[Tensor, " heads"] | None = None,
    segment_ids: Int[Tensor, "*batch seq"] | None = None,
) -> Float[Tensor, "*batch seq heads head_dim"]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = C_t^T h_t + D x_t.

    Linear attention with one decay a head: C are the queries, B the keys, dt x the values.

    Args:
        x: (*batch, seq, heads, head_dim).
        dt: step sizes, positive: softplus and bias are the caller's.
        A: negative, one for each head.
        B, C: one for each group of heads.
        D: what of x passes by, for each head.
        segment_ids: documents of packed rows; the state begins anew in each.
    Returns:
        (*batch, seq, heads, head_dim), dtype of x.
    Raises:
        ShapeError: the groups do not divide the heads.
    Source: Dao & Gu 2024, arXiv:2405.21060.
    """
    heads, groups = x.shape[-2], B.shape[-2]
    if heads % groups:
        raise ShapeError(
            "ssd: heads cannot be grouped",
            got=f"{heads} heads, {groups} groups of B and C",
            need="groups that divide the heads",
            fix=f"{groups * (heads // groups or 1)} heads",
        )
    B, C = (t.repeat_interleave(heads // groups, dim=-2) for t in (B, C))
    dt = dt.to(A.dtype)
    y = gated_linear_attention(C, B, x * dt[..., None], dt * A, segment_ids=segment_ids)
    y = y.to(x.dtype)
    return y if D is None else y + (D[:, None] * x).to(x.dtype)
