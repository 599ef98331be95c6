"""Gated activations of a feed-forward layer."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.ops.primitive import primitive


@primitive
def swiglu(
    gate: Float[Tensor, "*batch mlp"], up: Float[Tensor, "*batch mlp"]
) -> Float[Tensor, "*batch mlp"]:
    """SiLU-gated linear unit: y = gate * sigmoid(gate) * up.

    Args:
        gate, up: (*batch, mlp), of one shape.
    Returns:
        (*batch, mlp), dtype of the arguments.
    Raises:
        ShapeError: the shapes differ.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    _check_same("swiglu", gate, up)
    return F.silu(gate) * up


@primitive
def geglu(
    gate: Float[Tensor, "*batch mlp"],
    up: Float[Tensor, "*batch mlp"],
    *,
    approximate: Literal["none", "tanh"],
) -> Float[Tensor, "*batch mlp"]:
    """GELU-gated linear unit: y = gelu(gate) * up.

    Args:
        gate, up: (*batch, mlp), of one shape.
        approximate: "none" is gate * Φ(gate), "tanh" its approximation (Hugging Face's
            `gelu_pytorch_tanh`); no default, since models differ.
    Returns:
        (*batch, mlp), dtype of the arguments.
    Raises:
        ShapeError: the shapes differ.
    Source: Shazeer 2020, arXiv:2002.05202; Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    _check_same("geglu", gate, up)
    return F.gelu(gate, approximate=approximate) * up


def _check_same(op: str, gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape:
        raise ShapeError(
            f"{op}: gate and up differ in shape",
            got=f"gate {tuple(gate.shape)}, up {tuple(up.shape)}",
            need="one shape",
            fix="the axis mlp on both projections",
        )
