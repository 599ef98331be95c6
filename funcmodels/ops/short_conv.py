"""A causal convolution over the last few tokens, channel by channel."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.ops.recurrent import recurrent
from funcmodels.state import state

CHUNK = 4096


def short_conv(
    x: Float[Tensor, "*batch seq channels"],
    weight: Float[Tensor, "channels width"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    segment_ids: Int[Tensor, "*batch seq"] | None = None,
) -> Float[Tensor, "*batch seq channels"]:
    """y_t = sum_j weight[:, j] * x_{t - width + 1 + j} + bias, with zeros before a document.

    Args:
        x: (*batch, seq, channels).
        weight: its last column is that of the token itself, as in `torch.nn.Conv1d`.
        segment_ids: documents of packed rows; none sees another's tokens.
    Returns:
        (*batch, seq, channels), dtype of x.
    Raises:
        ShapeError: the weight has not one row a channel, or no column before the token's.
    """
    if weight.ndim != 2 or weight.shape[0] != x.shape[-1] or weight.shape[1] < 2:
        raise ShapeError(
            "short_conv: weight and x do not fit",
            got=f"x {tuple(x.shape)}, weight {tuple(weight.shape)}",
            need=f"({x.shape[-1]}, width), with a width of at least 2",
            fix='P("channels width")',
        )
    channels, width = weight.shape
    window = state(x="channels window", dtype=x.dtype, channels=channels, window=width - 1)
    params = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return recurrent(
        step, window, x, params=params, chunked=chunked, chunk=CHUNK, segment_ids=segment_ids
    )


def step(carry: dict[str, Tensor], x: Tensor, params: Any) -> tuple[dict[str, Tensor], Tensor]:
    """One token."""
    window = torch.cat([carry["x"], x[..., None]], dim=-1)  # (..., channels, width)
    y = (window * params["weight"]).sum(-1)
    return {"x": window[..., 1:]}, y + params["bias"] if "bias" in params else y


def chunked(carry: dict[str, Tensor], x: Tensor, params: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Some tokens at once: a sum of shifted rows, one for each column of the weight."""
    weight = params["weight"]
    rows = torch.cat([carry["x"].movedim(-1, -2), x], dim=-2)  # (..., width - 1 + n, channels)
    n, width = x.shape[-2], weight.shape[-1]
    y = torch.stack([rows.narrow(-2, j, n) * weight[:, j] for j in range(width)]).sum(0)
    carry = {"x": rows.narrow(-2, n, width - 1).movedim(-2, -1)}
    return carry, y + params["bias"] if "bias" in params else y
