"""FlexAttention: every argument of attention as a compiled kernel, on GPUs with Triton.

Softcap and ALiBi change the scores, causality, window and segments mask them; sinks are one factor
per row, after. The backward runs the forward again, since FlexAttention keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from funcmodels.ops.attention_heads import HALVES, fold, unfold
from funcmodels.ops.attention_kernel import Call, Kernel
from funcmodels.ops.attention_opaque import opaque
from funcmodels.ops.attention_reference import Inputs, Rules
from funcmodels.ops.attention_sinks import add_sinks, sinks_grad


def _lacks(call: Call) -> str | None:
    q = call.x.q
    if q.device.type != "cuda":
        return f"the device {q.device.type}"
    if find_spec("triton") is None:
        return "Triton"
    if q.dtype not in (*HALVES, torch.float32):
        return str(q.dtype)
    return "a sequence of no tokens" if q.shape[-3] == 0 else None


def attend(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, mask: BlockMask | None, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Attention without sinks.

    Args:
        q, k, v: (n, heads or kv_heads, seq, d or dv).
        slopes: (n, heads) float32.
        mask: of `mask_of`, called before: made in the same graph, torch 2.11 mixes up its strides.
    Returns:
        out (n, heads, seq, dv) and lse (n, heads, seq) float32.
    """
    softcap = rules.softcap

    def score_mod(score, b, h, i, j):
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if slopes is None else score + slopes[b, h] * (j - i)

    out, aux = flex_attention(
        q,
        k,
        v,
        score_mod=None if softcap is None and slopes is None else score_mod,
        block_mask=mask,
        scale=rules.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None, "asked for"
    return out, aux.lse


def mask_of(
    create: Callable[..., BlockMask], segment_ids: Tensor | None, rules: Rules, like: Tensor
) -> BlockMask | None:
    """Which keys each query sees, and which blocks of them none sees.

    Args:
        create: `create_block_mask`, or that compiled, which does not hold seq² flags.
        segment_ids: (n, seq).
        like: q, (n, heads, seq, d).
    """
    causal, _, window, _, _ = rules
    if not causal and window is None and segment_ids is None:
        return None
    seq = like.shape[-2]

    def mask_mod(b, h, i, j):
        seen = j <= i if causal else j < seq
        if window is not None:
            seen = seen & (i - j < window) & (j - i < window)
        return seen if segment_ids is None else seen & (segment_ids[b, i] == segment_ids[b, j])

    rows = None if segment_ids is None else like.shape[0]
    return create(mask_mod, rows, None, seq, seq, device=like.device)


@cache
def _compile(fn: Callable[..., Any]) -> Callable[..., Any]:
    # fullgraph: what cannot be compiled is an error, and not all scores in memory.
    return torch.compile(fn, fullgraph=True, dynamic=False)


def _compiled(
    heads: list[Tensor], slopes: Tensor | None, ids: Tensor | None, rules: Rules
) -> tuple[Tensor, Tensor]:
    """`attend` as a kernel, one for each set of rules: more than the 8 that torch allows."""
    with torch._dynamo.config.patch(recompile_limit=256):
        mask = mask_of(_compile(create_block_mask), ids, rules, heads[0])
        return _compile(attend)(*heads, slopes, mask, rules)


def _arguments(call: Call) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """q, k, v with their heads first, slopes and segment_ids of the folded batch."""
    x, ids, _ = call
    width = max(16, x.q.shape[-1])  # the least that a Triton dot takes
    width_v = max(16, x.v.shape[-1])
    heads = [
        fold(t, w).transpose(1, 2) for t, w in zip(x[:3], (width, width, width_v), strict=True)
    ]
    batch = x.q.shape[:-3]
    slopes = x.slopes
    if slopes is not None:
        slopes = slopes.float().expand(*batch, slopes.shape[-1]).reshape(-1, slopes.shape[-1])
    if ids is not None:
        ids = ids.expand(*batch, ids.shape[-1]).reshape(-1, ids.shape[-1])
    return heads, slopes, ids


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    x = call.x
    heads, slopes, ids = _arguments(call)
    with torch.no_grad():
        out, lse = _compiled(heads, slopes, ids, call.rules)
    out = unfold(out.transpose(1, 2), x.q, x.v.shape[-1])
    return add_sinks(out, lse.reshape(*x.q.shape[:-3], *lse.shape[-2:]), x.sinks)


def _backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor) -> Inputs:
    x = call.x
    heads, slopes, ids = _arguments(call)
    leaves = [t.detach().requires_grad_() for t in heads]
    with torch.enable_grad():
        # The forward has no sinks. With them each row is `keep` times that, and `keep` depends on
        # lse: so grad_out is scaled, and lse is given a gradient of its own.
        again, plain = _compiled(leaves, slopes, ids, call.rules)
    grad = fold(grad_out.to(x.q.dtype), again.shape[-1]).transpose(1, 2)
    if x.sinks is None:
        grads = torch.autograd.grad(again, leaves, grad)
    else:
        full = lse.reshape(plain.shape)
        keep = torch.exp(plain.detach() - full)  # (n, heads, seq)
        mean = (grad.float() * again.detach().float()).sum(-1) * keep
        by_lse = mean * (1 - keep)
        grads = torch.autograd.grad(
            (again, plain), leaves, ((grad * keep[..., None]).to(grad.dtype), by_lse)
        )
    q, k, v = (unfold(g.transpose(1, 2), t, t.shape[-1]) for g, t in zip(grads, x[:3], strict=True))
    return Inputs(q, k, v, sinks_grad(x, grad_out, out, lse), None)


FLEX = opaque(Kernel("flex", _lacks, _forward, _backward))
