"""ATen's flash kernel for CPUs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from funcmodels.ops import attention_cpu_documents as by_documents
from funcmodels.ops import attention_reference as reference
from funcmodels.ops.attention_cpu_dtype import gradient_dtype
from funcmodels.ops.attention_kernel import Call, Kernel
from funcmodels.ops.attention_reference import Inputs, compute_dtype
from funcmodels.ops.attention_sinks import add_sinks, sinks_grad

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _lacks(call: Call) -> str | None:
    q = call.x.q
    if q.device.type != "cpu":
        return f"the device {q.device.type}"
    if q.dtype not in DTYPES:
        return str(q.dtype)
    if call.rules.softcap is not None:
        return "softcap"
    return "a sequence of no tokens" if q.shape[-3] == 0 else None  # it divides by its blocks


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    x, _, rules = call
    width = max(x.q.shape[-1], x.v.shape[-1])
    q, k, v = (_fold(t, width) for t in x[:3])
    at = by_documents.documents_of(call)
    if at is not None:
        out, lse = by_documents.forward(q, k, v, at, causal=rules.causal, scale=rules.scale)
    else:
        mask, causal = _mask(call)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=rules.scale
        )
    batch, (seq, heads) = x.q.shape[:-3], x.q.shape[-3:-1]
    out = _unfold(out, x.q, x.v.shape[-1])
    return add_sinks(out, lse.reshape(*batch, heads, seq), x.sinks)


def _backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor) -> Inputs:
    x, _, rules = call
    width = max(x.q.shape[-1], x.v.shape[-1])
    tensors = (grad_out.to(x.q.dtype), x.q, x.k, x.v, out)
    folded = tuple(_fold(t, width) for t in tensors)
    lse_ = lse.reshape(math.prod(lse.shape[:-2]), *lse.shape[-2:])
    at = by_documents.documents_of(call)
    if at is not None:
        grads = by_documents.backward(folded, lse_, at, causal=rules.causal, scale=rules.scale)
    else:
        mask, causal = _mask(call)
        dtype = gradient_dtype(x.q.dtype, x.q.shape[-3])
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(t.to(dtype) for t in folded), lse_, 0.0, causal, attn_mask=mask, scale=rules.scale
        )
        grads = tuple(g.to(x.q.dtype) for g in found)
    q, k, v = (_unfold(g, t, t.shape[-1]) for g, t in zip(grads, x[:3], strict=True))
    return Inputs(q, k, v, sinks_grad(x, grad_out, out, lse), None)


def _mask(call: Call) -> tuple[Tensor | None, bool]:
    """An additive mask (n or 1, heads or 1, seq, seq), or None; and the kernel's causal flag."""
    x, segment_ids, rules = call
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


CPU_FLASH = Kernel("cpu_flash", _lacks, _forward, _backward)
