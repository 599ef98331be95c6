"""The gated delta rule: a memory that is corrected by what it already holds under a key."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from funcmodels.ops.linear_attention import decay_between, memory
from funcmodels.ops.recurrent import recurrent

CHUNK = 32


def gated_delta_rule(
    q: Float[Tensor, "*batch seq heads key"],
    k: Float[Tensor, "*batch seq heads key"],
    v: Float[Tensor, "*batch seq heads value"],
    log_decay: Float[Tensor, "*batch seq heads"],
    beta: Float[Tensor, "*batch seq heads"],
    *,
    scale: float = 1.0,
    normalise: bool = False,
    segment_ids: Int[Tensor, "*batch seq"] | None = None,
    remat: bool = False,
) -> Float[Tensor, "*batch seq heads value"]:
    """S' = exp(g_t) S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, y_t = scale S_t^T q_t.

    The state is kept in float32 (float64 where q is), and so is the arithmetic. Keys are meant to
    have length 1.

    Served on a CPU, vLLM's kernel takes a call whose q, k, v and beta are bfloat16, with 64 or 128
    features of keys and of values; the step and the chunked form all others.

    Args:
        q, k, v: one head of each for one head of the others.
        log_decay: g, at most 0.
        beta: how much of the memory under a key is replaced, in [0, 1]; up to 2 for the rule that
            may turn it round.
        scale: of the results, before they are rounded.
        normalise: take q and k at length 1, x / sqrt(sum x^2 + 1e-6).
        segment_ids: documents of packed rows; the memory begins anew in each.
        remat: compute again within chunks for the backward pass, as `ops.recurrent` does.
    Returns:
        (*batch, seq, heads, value), dtype of v.
    Source: Yang et al. 2024, arXiv:2412.06464; the chunked form, Yang et al. 2024,
        arXiv:2406.06484.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    y = recurrent(
        unit_step if normalise else step,
        memory(q.shape[-2], q.shape[-1], v.shape[-1], wide),
        {"q": q, "k": k, "v": v, "g": log_decay.to(wide), "beta": beta},
        chunked=unit_chunked if normalise else chunked,
        chunk=CHUNK,
        segment_ids=segment_ids,
        batch_dims=q.ndim - 3,
        remat=remat,
        kernel="unit_delta_rule" if normalise else "delta_rule",
    )
    return (y if scale == 1.0 else y * scale).to(v.dtype)


def unit_step(carry: dict[str, Tensor], x: Any) -> tuple[dict[str, Tensor], Tensor]:
    """One token, of which q and k are taken at length 1."""
    return step(carry, normalised(x, carry["S"].dtype))


def unit_chunked(carry: dict[str, Tensor], x: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Some tokens at once, of which q and k are taken at length 1."""
    return chunked(carry, normalised(x, carry["S"].dtype))


def normalised(x: Any, dtype: torch.dtype) -> Any:
    """With q and k of length 1."""
    return x | {name: unit(x[name].to(dtype)) for name in "qk"}


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1, and no division by zero."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def widened(x: Any, dtype: torch.dtype) -> Any:
    """In the dtype of the state: rounded inputs, exact arithmetic."""
    return {name: value.to(dtype) for name, value in x.items()}


def step(carry: dict[str, Tensor], x: Any) -> tuple[dict[str, Tensor], Tensor]:
    """One token."""
    x = widened(x, carry["S"].dtype)
    S = carry["S"] * x["g"].exp()[..., None, None]
    held = einsum(x["k"], S, "... h k, ... h k v -> ... h v")
    change = x["beta"][..., None] * (x["v"] - held)
    S = S + einsum(x["k"], change, "... h k, ... h v -> ... h k v")
    return {"S": S}, einsum(x["q"], S, "... h k, ... h k v -> ... h v")


def chunked(carry: dict[str, Tensor], x: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Some tokens at once. What each changes depends on the changes before it: a triangular system.

    With change_t = beta_t (v_t - what S held under k_t), the state is a sum of k_t change_t^T, and
    (I + A) change = beta (v - decayed k S), A_ts = beta_t (k_t . k_s) decay(s to t) for s < t.
    """
    S = carry["S"]
    x = widened(x, S.dtype)
    q, k, v = (x[name].movedim(-3, -2) for name in "qkv")  # (..., heads, n, key or value)
    g, beta = x["g"].movedim(-1, -2), x["beta"].movedim(-1, -2)[..., None]
    since = g.cumsum(-1).exp()[..., None]  # (..., heads, n, 1)
    between = decay_between(g)  # (..., heads, to, from)
    A = (k @ k.mT) * (beta * between)  # of which what lies below the diagonal is read
    wanted = beta * (v - since * (k @ S))
    change = torch.linalg.solve_triangular(A, wanted, upper=False, unitriangular=True)
    y = ((q @ k.mT) * between) @ change + since * (q @ S)
    left = between[..., -1, :, None]  # (..., heads, n, 1): from each token to the chunk's end
    S = S * since[..., -1:, :] + k.mT @ (left * change)
    return {"S": S}, y.movedim(-2, -3)
