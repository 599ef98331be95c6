"""Sinks for kernels that have none: one more logit changes the output by a factor per row.

    lse' = log(exp(lse) + exp(sink))        out' = out · exp(lse - lse') = out · sigmoid(lse - sink)

A flash kernel's backward uses exp(T - lse) and Σ grad_out · out only, so that it is right with
sinks when it is given lse' and out'. What is left is the gradient of the sinks themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcmodels.ops.attention_reference import Inputs, sum_to


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (*batch, seq, heads, dv) and lse (*batch, heads, seq) with the sinks in them."""
    if sinks is None:
        return out, lse
    sinks = sinks.to(lse.dtype)[..., None]  # (*batch, heads, 1)
    keep = torch.sigmoid(lse - sinks).transpose(-1, -2)[..., None]
    return (out * keep).to(out.dtype), torch.logaddexp(lse, sinks)


def sinks_grad(x: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor) -> Tensor | None:
    """The gradient of <grad_out, out> by the sinks, in their shape and dtype."""
    if x.sinks is None:
        return None
    weight = torch.exp(x.sinks.to(lse.dtype)[..., None] - lse)  # (*batch, heads, seq)
    mean = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1).mT
    return sum_to(-(weight * mean).sum(-1), x.sinks)
