"""Linear attention whose memory decays: a recurrence of one matrix a head."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.ops.recurrent import recurrent
from funcmodels.state import State, state

CHUNK = 64
LEVELS = 4
KEY_CHUNK = 2**LEVELS  # with a decay for each dim of the keys
FORGOTTEN = -1e4  # a logarithm whose exponential is 0, and 0 times which is no NaN


def gated_linear_attention(
    q: Float[Tensor, "*batch seq heads key"],
    k: Float[Tensor, "*batch seq heads key"],
    v: Float[Tensor, "*batch seq heads value"],
    log_decay: Float[Tensor, "*batch seq heads"] | Float[Tensor, "*batch seq heads key"],
    *,
    segment_ids: Int[Tensor, "*batch seq"] | None = None,
    remat: bool = False,
) -> Float[Tensor, "*batch seq heads value"]:
    """Linear attention with a decaying memory: S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t.

    The state is kept in float32 (float64 where q is), and so is the arithmetic. Scaling of q and
    normalising of y are the caller's.

    Args:
        q, k, v: one head of each for one head of the others.
        log_decay: g, at most 0; for each head, or for each dim of its keys.
        segment_ids: documents of packed rows; the memory begins anew in each.
        remat: compute again within chunks for the backward pass, as `ops.recurrent` does.
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
        batch_dims=q.ndim - 3,
        remat=remat,
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
    S = carry["S"]
    q, k, v = (x[name].movedim(-3, -2) for name in "qkv")  # (..., heads, n, key or value)
    g = x["g"].movedim(-1, -2)
    since = g.cumsum(-1).exp()[..., None]  # (..., heads, n, 1): from before the chunk to a token
    between = decay_between(g)  # (..., heads, to, from)
    y = ((q @ k.mT) * between) @ v + since * (q @ S)
    left = between[..., -1, :, None]  # (..., heads, n, 1): from each token to the chunk's end
    S = S * since[..., -1:, :] + k.mT @ (left * v)
    return {"S": S}, y.movedim(-2, -3)


def key_chunked(carry: dict[str, Tensor], x: Any) -> tuple[dict[str, Tensor], Tensor]:
    """As `chunked`, with a decay for each dim of the keys; of `KEY_CHUNK` tokens at most.

    No matrix of decays says then what tokens are to each other. Blocks of 2, 4, 8 ... tokens are
    halved: of a token in the left half and one in the right, the decay from the first to the middle
    goes to its key, that from there to the second to its query, and both are at most 1.

    Raises:
        ShapeError: more tokens, of which the first and the last would not meet.
    """
    S = carry["S"]
    q, k, v, g = (x[name].movedim(-3, -2) for name in "qkvg")  # (..., heads, n, key or value)
    n = g.shape[-2]
    if isinstance(n, int) and n > KEY_CHUNK:
        raise ShapeError(
            "gated linear attention: a chunk of too many tokens",
            got=f"{n} tokens",
            need=f"at most {KEY_CHUNK}, with a decay for each key",
            fix=f"chunk={KEY_CHUNK}",
        )
    g = g.clamp(min=FORGOTTEN)
    before, after, meet = _halves(g)
    keys = k[..., None, :, :] * (before @ g[..., None, :, :]).exp()  # (..., heads, levels, n, key)
    queries = q[..., None, :, :] * (after @ g[..., None, :, :]).exp()
    scores = (queries @ keys.mT * meet).sum(-3)  # (..., heads, to, from)
    y = scores @ v + (q * k).sum(-1, keepdim=True) * v
    since = g.cumsum(-2).exp()  # (..., heads, n, key)
    y = y + (q * since) @ S
    left = (_later(g) @ g).exp()  # (..., heads, n, key): from each token to the chunk's end
    S = S * since[..., -1, :, None] + (k * left).mT @ v
    return {"S": S}, y.movedim(-2, -3)


def _halves(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of blocks of 2, 4, 8 ... tokens: (levels, n, n), of 0 and 1, in the dtype of g.

    Whose decays lie between a token of a left half and the middle; between the middle and a token
    of a right half, itself among them; which tokens (to, from) meet there. Any two meet once.
    """
    at = torch.arange(g.shape[-2], device=g.device)
    half = 2 ** torch.arange(LEVELS, device=g.device)[:, None, None]
    one, other = at[:, None], at
    together = one // (2 * half) == other // (2 * half)
    is_right, other_right = one // half % 2 == 1, other // half % 2 == 1
    before = together & ~is_right & ~other_right & (other > one)
    after = together & is_right & other_right & (other <= one)
    return before.to(g.dtype), after.to(g.dtype), (together & is_right & ~other_right).to(g.dtype)


def _later(g: Tensor) -> Tensor:
    """Which tokens come after which: (n, n), of 0 and 1."""
    at = torch.arange(g.shape[-2], device=g.device)
    return (at > at[:, None]).to(g.dtype)


def decay_between(g: Tensor) -> Tensor:
    """The decay from each token to each later one, 0 to earlier ones: (..., n) -> (..., to, from).

    Summed for each pair, since a difference of running sums loses its digits where decay is strong,
    and a quotient of exponentials overflows.
    """
    n = g.shape[-1]
    ones = torch.ones(n, n, dtype=torch.bool, device=g.device)
    steps = torch.where(ones.tril(-1), g[..., :, None], 0)  # (..., to, from)
    return torch.where(ones.tril(), steps.cumsum(-2), -torch.inf).exp()
