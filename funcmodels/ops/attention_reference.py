"""Softmax attention and its derivatives, written out: the oracle, and the kernel of last resort.

With Δ_ij = j - i, per query head and with k, v of its key-value head:

    S = scale · q kᵀ          T = softcap · tanh(S / softcap) + slope · Δ, -inf where not visible
    P = exp(T - lse)          lse = log(Σ_j exp(T_ij) + exp(sink))          out = P v

Everything here is plain differentiable tensor code in float32 or better, O(seq²) in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What attention is differentiated by."""

    q: Tensor  # (*batch, seq, heads, d)
    k: Tensor  # (*batch, seq, kv_heads, d)
    v: Tensor  # (*batch, seq, kv_heads, dv)
    sinks: Tensor | None  # (*batch or 1s, heads)
    slopes: Tensor | None  # (*batch or 1s, heads)


class Tangents(NamedTuple):
    """A direction in `Inputs`; None is zero."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    sinks: Tensor | None
    slopes: Tensor | None


class Rules(NamedTuple):
    """The static arguments."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    kernel: str | None = None  # the name of the one asked for; this file does not look at it


class Softmax(NamedTuple):
    """The probabilities, with what the derivatives need."""

    probs: Tensor  # P, (*batch, kv_heads, group, seq, seq)
    sink_probs: Tensor | None  # (*batch, kv_heads, group, seq, 1)
    lse: Tensor  # (*batch, kv_heads, group, seq)
    cap: tuple[Tensor, Tensor] | None  # dT/dS and d²T/dS² where there is a softcap


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def distance(seq: int, device: torch.device) -> Tensor:
    """Δ: key position minus query position, (seq, seq)."""
    place = torch.arange(seq, device=device)
    return place[None, :] - place[:, None]


def visible(
    delta: Tensor, segment_ids: Tensor | None, causal: bool, window: int | None
) -> Tensor | None:
    """Which key each query sees: (seq, seq), (*batch, seq, seq), or None for all of them."""
    seen = None
    if causal:
        seen = delta <= 0
    if window is not None:
        near = delta > -window if causal else delta.abs() < window
        seen = near if seen is None else seen & near
    if segment_ids is not None:
        same = segment_ids[..., :, None] == segment_ids[..., None, :]
        seen = same if seen is None else seen & same
    return seen


def forward(x: Inputs, segment_ids: Tensor | None, rules: Rules) -> tuple[Tensor, Tensor]:
    """The output (*batch, seq, heads, dv) in q's dtype, and lse (*batch, heads, seq)."""
    soft = _softmax(x, segment_ids, rules)
    out = _queries_out(soft.probs.flatten(-3, -2) @ _keys_in(x.v, x), x)
    return out.to(x.q.dtype), soft.lse.flatten(-3, -2)


def jvp(x: Inputs, t: Tangents, segment_ids: Tensor | None, rules: Rules) -> Tensor:
    """The output's tangent along t."""
    soft = _softmax(x, segment_ids, rules)
    logits_t, _ = _logits_tangent(x, t, soft, rules)
    mean = _softmax_mean(logits_t, x, t, soft)
    out_t = (soft.probs * (logits_t - mean)).flatten(-3, -2) @ _keys_in(x.v, x)
    if t.v is not None:
        out_t = out_t + soft.probs.flatten(-3, -2) @ _keys_in(t.v, x)
    return _queries_out(out_t, x).to(x.q.dtype)


def vjp(x: Inputs, grad_out: Tensor, segment_ids: Tensor | None, rules: Rules) -> Inputs:
    """The gradient of <grad_out, out>."""
    soft = _softmax(x, segment_ids, rules)
    grad = _queries_in(grad_out, x)  # (*batch, kv_heads, group·seq, dv)
    grad_probs = _by_head(grad @ _keys_in(x.v, x).mT, x)
    mean = (soft.probs * grad_probs).sum(-1, keepdim=True)
    grad_logits = soft.probs * (grad_probs - mean)
    grad_sinks = None if soft.sink_probs is None else -soft.sink_probs * mean
    grad_v = soft.probs.flatten(-3, -2).mT @ grad
    grad_scores = grad_logits if soft.cap is None else grad_logits * soft.cap[0]
    return _gather(x, grad_scores, grad_logits, grad_sinks, grad_v, rules)


def second(
    x: Inputs, t: Tangents, grad_out: Tensor, segment_ids: Tensor | None, rules: Rules
) -> Inputs:
    """The gradient of <grad_out, jvp(x, t)>: the Hessian of <grad_out, out> applied to t.

    Being symmetric it serves twice: as the backward of `vjp` along cotangents t, and as the
    tangent of `vjp` along tangents t.
    """
    soft = _softmax(x, segment_ids, rules)
    logits_t, scores_t = _logits_tangent(x, t, soft, rules)
    logits_mean = _softmax_mean(logits_t, x, t, soft)
    grad = _queries_in(grad_out, x)
    grad_probs = _by_head(grad @ _keys_in(x.v, x).mT, x)  # ∂<grad_out, out>/∂P
    grad_mean = (soft.probs * grad_probs).sum(-1, keepdim=True)

    # <grad_out, jvp> = Σ P · ((T' - mean(T')) · grad_probs + grad_probs_v), by P and T'.
    by_logits_t = soft.probs * (grad_probs - grad_mean)
    by_probs = (logits_t - logits_mean) * grad_probs - logits_t * grad_mean
    if t.v is not None:
        by_probs = by_probs + _by_head(grad @ _keys_in(t.v, x).mT, x)
    mean = (soft.probs * by_probs).sum(-1, keepdim=True)
    by_sinks = None
    if soft.sink_probs is not None:
        by_sink_probs = torch.zeros_like(grad_mean)
        if t.sinks is not None:
            by_sink_probs = -_per_head(t.sinks, x) * grad_mean
        mean = mean + soft.sink_probs * by_sink_probs
        by_sinks = soft.sink_probs * (by_sink_probs - mean)
    by_logits = soft.probs * (by_probs - mean)
    by_v = (soft.probs * (logits_t - logits_mean)).flatten(-3, -2).mT @ grad

    by_scores, by_scores_t = by_logits, by_logits_t
    if soft.cap is not None:
        slope, curve = soft.cap
        by_scores = by_logits * slope + by_logits_t * scores_t * curve
        by_scores_t = by_logits_t * slope
    result = _gather(x, by_scores, by_logits, by_sinks, by_v, rules)
    # S' = scale · (q' kᵀ + q k'ᵀ) depends on q and k as well.
    q, k = result.q, result.k
    flat = by_scores_t.flatten(-3, -2) * rules.scale
    if t.k is not None:
        q = q + _queries_out(flat @ _keys_in(t.k, x), x).to(q.dtype)
    if t.q is not None:
        k = k + _keys_out(flat.mT @ _queries_in(t.q, x)).to(k.dtype)
    return result._replace(q=q, k=k)


def _softmax(x: Inputs, segment_ids: Tensor | None, rules: Rules) -> Softmax:
    """Scores, softcap, bias, mask and softmax."""
    scores = _by_head(_queries_in(x.q, x) @ _keys_in(x.k, x).mT, x) * rules.scale
    cap = None
    if rules.softcap is not None:
        tanh = torch.tanh(scores / rules.softcap)
        scores = rules.softcap * tanh
        slope = 1 - tanh * tanh
        cap = slope, -2 / rules.softcap * tanh * slope
    delta = distance(x.q.shape[-3], x.q.device)
    if x.slopes is not None:
        scores = scores + _per_head(x.slopes, x) * delta.to(scores.dtype)
    seen = visible(delta, segment_ids, rules.causal, rules.window)
    if seen is not None:
        seen = seen if seen.dim() == 2 else seen[..., None, None, :, :]
        scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    sink_probs = None
    if x.sinks is not None:
        sinks = _per_head(x.sinks, x)
        lse = torch.logaddexp(lse, sinks)
        sink_probs = torch.exp(sinks - lse)
    return Softmax(torch.exp(scores - lse), sink_probs, lse.squeeze(-1), cap)


def _logits_tangent(x: Inputs, t: Tangents, soft: Softmax, rules: Rules) -> tuple[Tensor, Tensor]:
    """The tangents of T and of S along t."""
    scores_t = torch.zeros_like(soft.probs)
    if t.q is not None:
        scores_t = scores_t + _by_head(_queries_in(t.q, x) @ _keys_in(x.k, x).mT, x)
    if t.k is not None:
        scores_t = scores_t + _by_head(_queries_in(x.q, x) @ _keys_in(t.k, x).mT, x)
    scores_t = scores_t * rules.scale
    logits_t = scores_t if soft.cap is None else scores_t * soft.cap[0]
    if t.slopes is not None:
        delta = distance(x.q.shape[-3], x.q.device)
        logits_t = logits_t + _per_head(t.slopes, x) * delta.to(logits_t.dtype)
    return logits_t, scores_t


def _softmax_mean(logits_t: Tensor, x: Inputs, t: Tangents, soft: Softmax) -> Tensor:
    """The tangent of lse: the mean of T' under the probabilities, the sink's share included."""
    mean = (soft.probs * logits_t).sum(-1, keepdim=True)
    if soft.sink_probs is not None and t.sinks is not None:
        mean = mean + soft.sink_probs * _per_head(t.sinks, x)
    return mean


def _gather(
    x: Inputs,
    by_scores: Tensor,
    by_logits: Tensor,
    by_sinks: Tensor | None,
    by_v: Tensor,
    rules: Rules,
) -> Inputs:
    """Cotangents of S, T, sink and v as cotangents of the inputs, in their shapes and dtypes."""
    flat = by_scores.flatten(-3, -2) * rules.scale
    q = _queries_out(flat @ _keys_in(x.k, x), x).to(x.q.dtype)
    k = _keys_out(flat.mT @ _queries_in(x.q, x)).to(x.k.dtype)
    sinks = slopes = None
    if x.sinks is not None and by_sinks is not None:
        sinks = sum_to(by_sinks.sum((-2, -1)).flatten(-2), x.sinks)
    if x.slopes is not None:
        delta = distance(x.q.shape[-3], x.q.device).to(by_logits.dtype)
        slopes = sum_to((by_logits * delta).sum((-2, -1)).flatten(-2), x.slopes)
    return Inputs(q, k, _keys_out(by_v).to(x.v.dtype), sinks, slopes)


def sum_to(value: Tensor, like: Tensor) -> Tensor:
    """The sum over the dims along which `like`, of the same rank, was broadcast; its dtype."""
    dims = [i for i in range(value.dim()) if like.shape[i] == 1 and value.shape[i] != 1]
    return (value.sum(dims, keepdim=True) if dims else value).to(like.dtype)


def _queries_in(q: Tensor, x: Inputs) -> Tensor:
    """(*batch, seq, heads, d) -> (*batch, kv_heads, group·seq, d): a group shares its keys."""
    kv_heads = x.k.shape[-2]
    q = q.to(compute_dtype(x.q.dtype)).unflatten(-2, (kv_heads, q.shape[-2] // kv_heads))
    return q.movedim(-4, -2).flatten(-3, -2)


def _queries_out(q: Tensor, x: Inputs) -> Tensor:
    """The inverse of `_queries_in`."""
    group = x.q.shape[-2] // x.k.shape[-2]
    return q.unflatten(-2, (group, x.q.shape[-3])).movedim(-2, -4).flatten(-3, -2)


def _keys_in(k: Tensor, x: Inputs) -> Tensor:
    """(*batch, seq, kv_heads, d) -> (*batch, kv_heads, seq, d)."""
    return k.to(compute_dtype(x.q.dtype)).transpose(-3, -2)


def _keys_out(k: Tensor) -> Tensor:
    """The inverse of `_keys_in`."""
    return k.transpose(-3, -2)


def _by_head(scores: Tensor, x: Inputs) -> Tensor:
    """(*batch, kv_heads, group·seq, seq) -> (*batch, kv_heads, group, seq, seq)."""
    return scores.unflatten(-2, (x.q.shape[-2] // x.k.shape[-2], x.q.shape[-3]))


def _per_head(values: Tensor, x: Inputs) -> Tensor:
    """(*batch, heads) -> (*batch, kv_heads, group, 1, 1)."""
    kv_heads = x.k.shape[-2]
    values = values.to(compute_dtype(x.q.dtype))
    return values.unflatten(-1, (kv_heads, values.shape[-1] // kv_heads))[..., None, None]
