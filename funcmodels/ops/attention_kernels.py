"""The kernels attention runs on, and the one function that chooses among them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from funcmodels.ops import attention_reference as reference
from funcmodels.ops.attention_reference import Inputs, Rules, compute_dtype

Kernel = Literal["reference", "cpu_flash"]

CPU_FLASH_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def choose(x: Inputs, rules: Rules, *, slopes_grad: bool = False) -> Kernel:
    """The fastest kernel that can express every argument."""
    if (
        x.q.device.type == "cpu"
        and x.q.dtype in CPU_FLASH_DTYPES
        and rules.softcap is None
        and not slopes_grad  # the kernel has no gradient for its mask
        and x.q.shape[-3] != 0  # it divides by the number of its blocks
    ):
        return "cpu_flash"
    return "reference"


def forward(x: Inputs, segment_ids: Tensor | None, rules: Rules) -> tuple[Tensor, Tensor]:
    """The output (*batch, seq, heads, dv) in q's dtype, and lse (*batch, heads, seq)."""
    if choose(x, rules) == "cpu_flash":
        return _cpu_flash_forward(x, segment_ids, rules)
    return reference.forward(x, segment_ids, rules)


def backward(
    x: Inputs,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_ids: Tensor | None,
    rules: Rules,
    *,
    slopes_grad: bool,
) -> Inputs:
    """The gradient of <grad_out, out>; that of slopes only if asked for."""
    if choose(x, rules, slopes_grad=slopes_grad) == "cpu_flash":
        return _cpu_flash_backward(x, grad_out, out, lse, segment_ids, rules)
    return reference.vjp(x, grad_out, segment_ids, rules)


def _cpu_flash_forward(
    x: Inputs, segment_ids: Tensor | None, rules: Rules
) -> tuple[Tensor, Tensor]:
    """ATen's CPU flash kernel, with a sink added to its logsumexp afterwards."""
    width = max(x.q.shape[-1], x.v.shape[-1])
    mask, causal = _cpu_flash_mask(x, segment_ids, rules)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_fold(t, width) for t in (x.q, x.k, x.v)),
        0.0,
        causal,
        attn_mask=mask,
        scale=rules.scale,
    )
    batch, (seq, heads) = x.q.shape[:-3], x.q.shape[-3:-1]
    out = _unfold(out, x.q, x.v.shape[-1])
    lse = lse.reshape(*batch, heads, seq)
    if x.sinks is None:
        return out, lse
    sinks = x.sinks.to(lse.dtype)[..., None]  # (*batch, heads, 1)
    keep = torch.sigmoid(lse - sinks).transpose(-1, -2)[..., None]
    return (out * keep).to(out.dtype), torch.logaddexp(lse, sinks)


def _cpu_flash_backward(
    x: Inputs,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_ids: Tensor | None,
    rules: Rules,
) -> Inputs:
    """Its backward. It only uses exp(T - lse) and Σ grad_out · out, so it is right with sinks."""
    width = max(x.q.shape[-1], x.v.shape[-1])
    mask, causal = _cpu_flash_mask(x, segment_ids, rules)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_fold(t, width) for t in (grad_out.to(x.q.dtype), x.q, x.k, x.v, out)),
        lse.reshape(math.prod(lse.shape[:-2]), *lse.shape[-2:]),
        0.0,
        causal,
        attn_mask=mask,
        scale=rules.scale,
    )
    q, k, v = (_unfold(g, t, t.shape[-1]) for g, t in zip(grads, x[:3], strict=True))
    sinks = None
    if x.sinks is not None:
        weight = torch.exp(x.sinks.to(lse.dtype)[..., None] - lse)  # (*batch, heads, seq)
        mean = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1).mT
        sinks = reference.sum_to(-(weight * mean).sum(-1), x.sinks)
    return Inputs(q, k, v, sinks, None)


def _cpu_flash_mask(
    x: Inputs, segment_ids: Tensor | None, rules: Rules
) -> tuple[Tensor | None, bool]:
    """An additive mask (n or 1, heads or 1, seq, seq), or None; and the kernel's causal flag."""
    if rules.window is None and segment_ids is None and x.slopes is None:
        return None, rules.causal
    delta = reference.distance(x.q.shape[-3], x.q.device)
    dtype = compute_dtype(x.q.dtype)  # fp32: bf16 would round a bias of 257 to 256
    bias = torch.zeros((), dtype=dtype, device=x.q.device)
    batch = x.q.shape[:-3]
    if x.slopes is not None:
        slopes = _fold_batch(x.slopes.to(dtype), batch, 1)
        bias = slopes[..., None, None] * delta.to(dtype)
    seen = reference.visible(delta, segment_ids, rules.causal, rules.window)
    if seen is not None:
        seen = _fold_batch(seen, batch, 2)[:, None]
        bias = torch.where(seen, bias, -torch.inf)
    return bias, False


def _fold(t: Tensor, width: int) -> Tensor:
    """(*batch, seq, heads, d) -> (n, heads, seq, width), zeros appended, the last dim dense."""
    missing = width - t.shape[-1]
    if missing:
        # Not F.pad: it specialises a symbolic sequence length to its example.
        t = torch.cat((t, t.new_zeros(*t.shape[:-1], missing)), dim=-1)
    t = t.contiguous()
    return t.reshape(math.prod(t.shape[:-3]), *t.shape[-3:]).transpose(1, 2)


def _fold_batch(t: Tensor, batch: torch.Size, dims: int) -> Tensor:
    """(*batch or 1s, ...) -> (n or 1, ...) with `dims` dims after the first."""
    rest = t.shape[t.dim() - dims :]
    if any(n != 1 for n in t.shape[:-dims]):
        t = t.expand(*batch, *rest)
    return t.reshape(math.prod(t.shape[:-dims]), *rest)


def _unfold(t: Tensor, like: Tensor, width: int) -> Tensor:
    """The inverse of `_fold`, with the batch, seq and head dims of `like`."""
    t = t.transpose(1, 2)
    t = t if t.shape[-1] == width else t.narrow(-1, 0, width)
    return t.reshape(*like.shape[:-1], width)
