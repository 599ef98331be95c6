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
CACHED = 128  # on a CPU, of which the rows stay in its cache from one operation to the next


def short_conv(
    x: Float[Tensor, "*batch seq channels"],
    weight: Float[Tensor, "channels width"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    segment_ids: Int[Tensor, "*batch seq"] | None = None,
) -> Float[Tensor, "*batch seq channels"]:
    """y_t = sum_j weight[:, j] * x_{t - width + 1 + j} + bias, with zeros before a document.

    The sum is taken in float32 (float64 where x is) and rounded once, as `torch.nn.Conv1d` does:
    rounded after each term, it made a bfloat16 Mamba-2's gradients a fifth less exact.

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
    window = state(x="window channels", dtype=x.dtype, window=width - 1, channels=channels)
    return recurrent(
        step,
        window,
        x,
        params={"weight": weight} if bias is None else {"weight": weight, "bias": bias},
        chunked=chunked,
        chunk=CACHED if by_itself(x) else CHUNK,
        segment_ids=segment_ids,
        batch_dims=x.ndim - 2,
        kernel="short_conv",
    )


def by_itself(x: Tensor) -> bool:
    """Whether each operation runs by itself, on a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def step(carry: dict[str, Tensor], x: Tensor, params: Any) -> tuple[dict[str, Tensor], Tensor]:
    """One token."""
    window = torch.cat([carry["x"], x[..., None, :]], dim=-2)  # (..., width, channels)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (window.to(wide) * params["weight"].t().to(wide)).sum(-2)
    y = y + params["bias"].to(wide) if "bias" in params else y
    return {"x": window[..., 1:, :]}, y.to(x.dtype)


def chunked(carry: dict[str, Tensor], x: Tensor, params: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Some tokens at once: a sum of shifted rows, one for each column of the weight."""
    rows = torch.cat([carry["x"], x], dim=-2)  # (..., width - 1 + n, channels)
    wide = torch.promote_types(x.dtype, torch.float32)
    # Each column is read once for every token.
    columns = params["weight"].t().to(wide).contiguous().unbind(0)
    n, width, terms = x.shape[-2], len(columns), rows.to(wide)
    # Expanded, since `addcmul` does not do so itself with a symbolic number of tokens.
    parts = [(terms.narrow(-2, j, n), column.expand_as(x)) for j, column in enumerate(columns)]
    y = params["bias"].to(wide).expand_as(x) if "bias" in params else torch.mul(*parts.pop(0))
    for part, column in parts:
        y = torch.addcmul(y, part, column)
    return {"x": rows.narrow(-2, n, width - 1)}, y.to(x.dtype)
