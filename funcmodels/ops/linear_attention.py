"""Linear attention whose memory decays: a recurrence of one matrix a head."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from funcmodels.ops.recurrent import recurrent
from funcmodels.state import State, state

CHUNK = 64
KEY_CHUNK = 8  # with a decay for each key dim, a chunk holds chunk^2 * key numbers


def gated_linear_attention(
    q: Float[Tensor, "*batch seq heads key"],
    k: Float[Tensor, "*batch seq heads key"],
    v: Float[Tensor, "*batch seq heads value"],
    log_decay: Float[Tensor, "*batch seq heads"] | Float[Tensor, "*batch seq heads key"],
    *,
    segment_ids: Int[Tensor, "*batch seq"] | None = None,
) -> Float[Tensor, "*batch seq heads value"]:
    """Linear attention with a decaying memory: S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t.

    The state is kept in float32 (float64 where q is), and so is the arithmetic. Scaling of q and
    normalising of y are the caller's.

    Args:
        q, k, v: one head of each for one head of the others.
        log_decay: g, at most 0; for each head, or for each dim of its keys.
        segment_ids: documents of packed rows; the memory begins anew in each.
    Returns:
        (*batch, seq, heads, value), dtype of v.
    Source: Yang et al. 2023, arXiv:2312.06635; with one decay a head, Sun et al. 2023,
        arXiv:2307.08621.
    """
    by_key = log_decay.ndim == q.ndim
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    xs = {"q": q.to(wide), "k": k.to(wide), "v": v.to(wide), "g": log_decay.to(wide)}
    y = recurrent(
        key_step if by_key else step,
        memory(q.shape[-2], q.shape[-1], v.shape[-1], wide),
        xs,
        chunked=key_chunked if by_key else chunked,
        chunk=KEY_CHUNK if by_key else CHUNK,
        segment_ids=segment_ids,
    )
    return y.to(v.dtype)


def memory(heads: int, key: int, value: int, dtype: torch.dtype = torch.float32) -> State:
    """The state: one matrix a head."""
    return state(S="heads key value", dtype=dtype, heads=heads, key=key, value=value)


def step(carry: dict[str, Tensor], x: Any) -> tuple[dict[str, Tensor], Tensor]:
    """One token, with a decay for each head."""
    return key_step(carry, x | {"g": x["g"][..., None]})


def key_step(carry: dict[str, Tensor], x: Any) -> tuple[dict[str, Tensor], Tensor]:
    """One token, with a decay for each dim of the keys."""
    S = carry["S"] * x["g"].exp()[..., None]
    S = S + einsum(x["k"], x["v"], "... h k, ... h v -> ... h k v")
    return {"S": S}, einsum(x["q"], S, "... h k, ... h k v -> ... h v")


def chunked(carry: dict[str, Tensor], x: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Some tokens at once: what they are to each other is a masked matrix of products."""
    S, q, k, v = carry["S"], x["q"], x["k"], x["v"]
    since = x["g"].cumsum(-2).exp()  # (..., n, heads): the decay from before the chunk to a token
    between = decay_between(x["g"].movedim(-1, -2))  # (..., heads, to, from)
    scores = einsum(q, k, "... t h k, ... s h k -> ... h t s") * between
    y = einsum(scores, v, "... h t s, ... s h v -> ... t h v")
    y = y + einsum(q * since[..., None], S, "... t h k, ... h k v -> ... t h v")
    left = between[..., -1, :]  # (..., heads, n): from each token to the chunk's end
    S = S * since[..., -1, :, None, None]
    return {"S": S + einsum(k, left, v, "... s h k, ... h s, ... s h v -> ... h k v")}, y


def key_chunked(carry: dict[str, Tensor], x: Any) -> tuple[dict[str, Tensor], Tensor]:
    """As `chunked`, with a decay for each dim of the keys."""
    S, q, k, v = carry["S"], x["q"], x["k"], x["v"]
    since = x["g"].cumsum(-3).exp()  # (..., n, heads, key)
    between = decay_between(x["g"].movedim(-3, -1))  # (..., heads, key, to, from)
    scores = einsum(q, k, between, "... t h k, ... s h k, ... h k t s -> ... h t s")
    y = einsum(scores, v, "... h t s, ... s h v -> ... t h v")
    y = y + einsum(q * since, S, "... t h k, ... h k v -> ... t h v")
    left = between[..., -1, :]  # (..., heads, key, n)
    S = S * since[..., -1, :, :, None]
    return {"S": S + einsum(k, left, v, "... s h k, ... h k s, ... s h v -> ... h k v")}, y


def decay_between(g: Tensor) -> Tensor:
    """The decay from each token to each later one, 0 to earlier ones: (..., n) -> (..., to, from).

    Summed for each pair, since a difference of running sums loses its digits where decay is strong,
    and a quotient of exponentials overflows.
    """
    n = g.shape[-1]
    ones = torch.ones(n, n, dtype=torch.bool, device=g.device)
    steps = torch.where(ones.tril(-1), g[..., :, None], 0)  # (..., to, from)
    return torch.where(ones.tril(), steps.cumsum(-2), -torch.inf).exp()
