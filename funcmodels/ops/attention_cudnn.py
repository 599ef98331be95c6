"""cuDNN's attention, through ATen: dense sequences on NVIDIA GPUs from Hopper on."""

from __future__ import annotations

import torch
from torch import Tensor

from funcmodels.ops.attention_heads import HALVES, fold, unfold
from funcmodels.ops.attention_kernel import Call, Kernel
from funcmodels.ops.attention_opaque import opaque
from funcmodels.ops.attention_reference import Inputs
from funcmodels.ops.attention_sinks import add_sinks, sinks_grad


def _lacks(call: Call) -> str | None:
    x, segment_ids, rules = call
    if x.q.device.type != "cuda":
        return f"the device {x.q.device.type}"
    if not torch.backends.cudnn.is_available():
        return "cuDNN"
    if torch.cuda.get_device_capability(x.q.device) < (9, 0):
        return "GPUs before Hopper, where flash attention is as fast"
    if x.q.dtype not in HALVES:
        return str(x.q.dtype)
    if max(x.q.shape[-1], x.v.shape[-1]) > 128:
        return "heads wider than 128"
    if segment_ids is not None:
        # ATen hands packed sequences to it too, 100 times slower than flash attention.
        return "segment_ids"
    for name, value in (("window", rules.window), ("softcap", rules.softcap)):
        if value is not None:
            return name
    if x.slopes is not None:
        return "alibi_slopes"
    if torch.are_deterministic_algorithms_enabled():
        return "a deterministic backward"
    return "sequences shorter than 2" if x.q.shape[-3] < 2 else None


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    x, _, rules = call
    q, k, v = (_heads_first(t) for t in x[:3])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, rules.causal, False, scale=rules.scale
    )
    out = unfold(out.transpose(1, 2), x.q, x.v.shape[-1])
    lse = lse.reshape(*x.q.shape[:-3], x.q.shape[-2], x.q.shape[-3])
    return add_sinks(out, lse, x.sinks)


def _backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor) -> Inputs:
    x, _, rules = call
    q, k, v = (_heads_first(t) for t in x[:3])
    seq = x.q.shape[-3]
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _heads_first(grad_out.to(q.dtype).contiguous()),
        q,
        k,
        v,
        _heads_first(out),
        lse.reshape(q.shape[0], q.shape[1], seq, 1),
        no_dropout,
        no_dropout,
        None,
        None,
        None,
        seq,
        seq,
        0.0,
        rules.causal,
        scale=rules.scale,
    )
    q, k, v = (unfold(g.transpose(1, 2), t, t.shape[-1]) for g, t in zip(grads, x[:3], strict=True))
    return Inputs(q, k, v, sinks_grad(x, grad_out, out, lse), None)


def _heads_first(t: Tensor) -> Tensor:
    """(*batch, seq, heads, d) -> (n, heads, seq, d in eights), a view where it can be."""
    return fold(t, -(-t.shape[-1] // 8) * 8).transpose(1, 2)


CUDNN = opaque(Kernel("cudnn", _lacks, _forward, _backward))
