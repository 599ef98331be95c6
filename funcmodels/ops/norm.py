"""Normalisation over the last dim."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.ops.primitive import primitive


@primitive
def rms_norm(
    x: Float[Tensor, "*batch hidden"],
    weight: Float[Tensor, " hidden"],
    *,
    eps: float,
    offset: float = 0.0,
    rounds_once: bool = False,
) -> Float[Tensor, "*batch hidden"]:
    """Root-mean-square normalisation, without mean subtraction.

    y = x / sqrt(mean(x**2) + eps) * (offset + weight), over the last dim; the mean is taken in
    float32. With offset 0 the quotient is rounded to x's dtype before the product, as Llama
    does, unless `rounds_once`; otherwise only the result is, as Gemma, GPT-OSS and OLMo 2 do.

    Args:
        x: (*batch, hidden), float16, bfloat16, float32, or float64, which stays in float64.
        weight: (hidden,).
        eps: added inside the square root; no default, since models differ.
        offset: 1.0 where checkpoints hold weight - 1, as Gemma's do.
        rounds_once: take the product in float32 too. In bfloat16, a second rounding shows most in
            gradients that are sums over all tokens, as those of GPT-OSS's sinks.
    Returns:
        (*batch, hidden), dtype of x.
    Raises:
        ShapeError: weight.shape[0] differs from x.shape[-1].
    Source: Zhang & Sennrich 2019, arXiv:1910.07467; `transformers` LlamaRMSNorm, GemmaRMSNorm,
        GptOssRMSNorm.
    """
    _check_scale("rms_norm", "weight", x, weight)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset == 0.0 and not rounds_once:
        return (weight * unit.to(x.dtype)).to(x.dtype)
    return (unit * (offset + weight.to(wide.dtype))).to(x.dtype)


@primitive
def layer_norm(
    x: Float[Tensor, "*batch hidden"],
    weight: Float[Tensor, " hidden"] | None,
    bias: Float[Tensor, " hidden"] | None = None,
    *,
    eps: float,
) -> Float[Tensor, "*batch hidden"]:
    """Layer normalisation.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dim; the variance is
    the biased one.

    Args:
        x: (*batch, hidden).
        weight, bias: (hidden,), cast to x's dtype; None leaves the factor or the term out.
        eps: added inside the square root; no default, since models differ.
    Returns:
        (*batch, hidden), dtype of x.
    Raises:
        ShapeError: weight or bias is not (x.shape[-1],).
    Source: Ba et al. 2016, arXiv:1607.06450; `torch.nn.LayerNorm`.
    """
    for name, scale in (("weight", weight), ("bias", bias)):
        if scale is not None:
            _check_scale("layer_norm", name, x, scale)
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _check_scale(op: str, name: str, x: Tensor, scale: Tensor) -> None:
    if scale.dim() != 1 or scale.shape[0] != x.shape[-1]:
        raise ShapeError(
            f"{op}: {name} must fit the last dim of x",
            got=f"x {tuple(x.shape)}, {name} {tuple(scale.shape)}",
            need=f"{name} ({x.shape[-1]},)",
            fix=f"declare {name} with the axis of x's last dim, of size {x.shape[-1]}",
        )
