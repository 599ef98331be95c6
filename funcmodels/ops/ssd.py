"""The state-space layer of Mamba-2."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.ops.linear_attention import decay_between
from funcmodels.ops.recurrent import recurrent
from funcmodels.state import state

CHUNK = 64


def ssd(
    x: Float[Tensor, "*batch seq heads head_dim"],
    dt: Float[Tensor, "*batch seq heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "*batch seq groups state"],
    C: Float[Tensor, "*batch seq groups state"],
    *,
    D: Float[Tensor, " heads"] | None = None,
    segment_ids: Int[Tensor, "*batch seq"] | None = None,
    remat: bool = False,
) -> Float[Tensor, "*batch seq heads head_dim"]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t.

    The state is kept in float32 (float64 where x is), and so is the arithmetic. Linear attention
    with one decay a head: C are the queries, B the keys, dt x the values.

    Args:
        x: (*batch, seq, heads, head_dim).
        dt: step sizes, positive: softplus and bias are the caller's.
        A: negative, one for each head.
        B, C: one for each group of heads.
        D: what of x passes by, for each head.
        segment_ids: documents of packed rows; the state begins anew in each.
        remat: compute again within chunks for the backward pass, as `ops.recurrent` does.
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
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    held = state(
        h="heads head_dim state", dtype=wide, heads=heads, head_dim=x.shape[-1], state=B.shape[-1]
    )
    params = {"A": A.to(wide)} | ({} if D is None else {"D": D.to(wide)})
    return recurrent(
        step,
        held,
        {"x": x, "dt": dt.to(wide), "B": B, "C": C},
        params=params,
        chunked=chunked,
        chunk=CHUNK,
        segment_ids=segment_ids,
        batch_dims=x.ndim - 3,
        remat=remat,
        kernel="ssd",
    )


def step(carry: dict[str, Tensor], x: Any, params: Any) -> tuple[dict[str, Tensor], Tensor]:
    """One token."""
    h, dt, v = carry["h"], x["dt"], x["x"].to(carry["h"].dtype)
    (B, C), of = _of_heads((x["B"].to(h.dtype), x["C"].to(h.dtype)), h.shape[-3])
    h = h * (dt * params["A"]).exp()[..., None, None]
    h = h + einsum(v * dt[..., None], B, f"... h p, ... {of} n -> ... h p n")
    y = einsum(h, C, f"... h p n, ... {of} n -> ... h p")
    return {"h": h}, _with_skip(y, v, params).to(x["x"].dtype)


def chunked(carry: dict[str, Tensor], x: Any, params: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Some tokens at once: what they are to each other is a masked matrix of products."""
    h, dt, v = carry["h"], x["dt"], x["x"].to(carry["h"].dtype)
    B, C = (x[name].to(h.dtype) for name in "BC")
    decay = dt * params["A"]  # (..., n, heads)
    since = decay.cumsum(-2).exp()  # the decay from before the chunk to a token
    between = decay_between(decay.movedim(-1, -2))  # (..., heads, to, from)
    scores = einsum(C, B, "... t g n, ... s g n -> ... g t s")
    if B.shape[-2] > 1:
        scores = scores.repeat_interleave(h.shape[-3] // B.shape[-2], dim=-3)
    (B, C), of = _of_heads((B, C), h.shape[-3])
    u = v * dt[..., None]
    y = einsum(scores * between, u, "... h t s, ... s h p -> ... t h p")
    y = y + since[..., None] * einsum(C, h, f"... t {of} n, ... h p n -> ... t h p")
    left = between[..., -1, :].movedim(-1, -2)  # (..., n, heads): from each token to the end
    h = h * since[..., -1, :, None, None]
    h = h + einsum(u * left[..., None], B, f"... s h p, ... s {of} n -> ... h p n")
    return {"h": h}, _with_skip(y, v, params).to(x["x"].dtype)


def _of_heads(groups: tuple[Tensor, ...], heads: int) -> tuple[list[Tensor], str]:
    """Of tensors (..., groups, n), what the heads of a group share, and its name in a product.

    One group is no dim of a product: it has the same rows for all heads, those of any rank too.
    """
    if groups[0].shape[-2] == 1:
        return [t.squeeze(-2) for t in groups], ""
    return [t.repeat_interleave(heads // t.shape[-2], dim=-2) for t in groups], "h"


def _with_skip(y: Tensor, x: Tensor, params: Any) -> Tensor:
    """What of x passes by, added."""
    return y + params["D"][:, None] * x if "D" in params else y
