"""Scaled dot-product attention with everything decoder models add to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcmodels.errors import ShapeError
from funcmodels.ops.attention_function import Attention
from funcmodels.ops.attention_kernels import forced
from funcmodels.ops.primitive import primitive


@primitive
def attention(
    q: Float[Tensor, "*batch seq heads d"],
    k: Float[Tensor, "*batch seq kv_heads d"],
    v: Float[Tensor, "*batch seq kv_heads dv"],
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    alibi_slopes: Float[Tensor, " heads"] | Sequence[float] | None = None,
    segment_ids: Int[Tensor, "*batch seq"] | None = None,
) -> Float[Tensor, "*batch seq heads dv"]:
    """Softmax attention over the sequence, per head.

    s_ij = scale * q_i·k_j; s = softcap * tanh(s / softcap); s_ij += slope * (j - i)
    out_i = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + exp(sink)), over the visible j.

    Query head h reads key-value head h // (heads // kv_heads). It differentiates to any order,
    forwards and backwards, by q, k, v, sinks and alibi_slopes, and vectorises under vmap. The first
    gradient runs on the kernel of the device, see `fm.attention_kernel`; others hold all scores.

    Args:
        q, k, v: queries, keys and values, of one floating dtype; any number of batch dims.
        causal: key j is visible to query i only if j <= i.
        scale: of the scores; d**-0.5 unless given.
        window: in tokens: key j is visible only if i - window < j, and without `causal` only if
            also j < i + window. Hugging Face's `sliding_window`.
        softcap: bound of the scores before the bias and the mask, as in Gemma 2.
        sinks: one more logit per head in the softmax, with no value, as in GPT-OSS.
        alibi_slopes: per head, times the distance j - i; a sequence of floats is a constant.
        segment_ids: keys are visible only to queries with the same id: packed sequences.
    Returns:
        (*batch, seq, heads, dv), dtype of q.
    Raises:
        ShapeError: shapes that do not fit, or window or softcap not positive.
    Source: Vaswani et al. 2017, arXiv:1706.03762; GQA: Ainslie et al. 2023, arXiv:2305.13245;
        ALiBi: Press et al. 2021, arXiv:2108.12409; sinks: `transformers` gpt_oss.
    """
    _check_shapes(q, k, v)
    _check_options(q, window, softcap, segment_ids)
    batch = q.dim() - 3
    if alibi_slopes is not None and not isinstance(alibi_slopes, Tensor):
        alibi_slopes = torch.tensor(tuple(alibi_slopes), dtype=torch.float32, device=q.device)
    out, _lse = Attention.apply(
        q,
        k,
        v,
        _per_head("sinks", sinks, q.shape[-2], batch),
        _per_head("alibi_slopes", alibi_slopes, q.shape[-2], batch),
        segment_ids,
        causal,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        window,
        softcap,
        forced(),
    )
    return out


def _per_head(name: str, values: Tensor | None, heads: int, batch: int) -> Tensor | None:
    """(heads,) -> (1, ..., 1, heads), so that vmap can put a batch dim in front."""
    if values is None:
        return None
    if values.dim() != 1 or values.shape[0] != heads:
        raise ShapeError(
            f"attention: {name} must hold one value per query head",
            got=f"{_shapes(**{name: values})}, {heads} query heads",
            need=f"{name} ({heads},)",
            fix=f"{name}.reshape({heads})"
            if values.numel() == heads
            else f"declare {name} with the axis of the query heads, not of the key-value heads",
        )
    return values.reshape(*[1] * batch, heads)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k and v fit together."""
    if min(q.dim(), k.dim(), v.dim()) < 3:
        raise ShapeError(
            "attention: q, k and v need a dim for the sequence, the heads and the features",
            got=_shapes(q=q, k=k, v=v),
            need="q (*batch, seq, heads, d), k and v (*batch, seq, kv_heads, ...)",
            fix='project with "... e, h d e -> ... h d", or x.unflatten(-1, (heads, -1))',
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(
            "attention: q, k and v differ in dtype",
            got=f"q {q.dtype}, k {k.dtype}, v {v.dtype}",
            need="one dtype",
            fix=f"k.to({q.dtype}), v.to({q.dtype})",
        )
    if k.shape[:-1] != v.shape[:-1] or q.shape[:-2] != k.shape[:-2]:
        swapped = (
            q.shape[:-3] == k.shape[:-3] == v.shape[:-3]
            and q.shape[-2] == k.shape[-2] == v.shape[-2]
            and k.shape[-3] == v.shape[-3]
        )
        raise ShapeError(
            "attention: q, k and v differ in their batch or sequence dims, or k and v in heads",
            got=_shapes(q=q, k=k, v=v),
            need="q (*batch, seq, heads, d), k (*batch, seq, kv_heads, d), "
            "v (*batch, seq, kv_heads, dv)",
            fix="heads come after seq here: q.transpose(-3, -2), and k and v alike"
            if swapped
            else f"k and v with leading dims {tuple(q.shape[:-2])}, such as k.expand(...)",
        )
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            "attention: q and k differ in their last dim",
            got=_shapes(q=q, k=k, v=v),
            need="q (..., heads, d) and k (..., kv_heads, d)",
            fix=f"project k to {q.shape[-1]} features per head, or q to {k.shape[-1]}",
        )
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads % kv_heads:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ShapeError(
            "attention: the query heads do not divide over the key-value heads",
            got=f"heads={heads}, kv_heads={kv_heads}",
            need="heads a multiple of kv_heads",
            fix=f"kv_heads in {{{', '.join(map(str, divisors))}}}",
        )


def _check_options(
    q: Tensor, window: int | None, softcap: float | None, segment_ids: Tensor | None
) -> None:
    """The options make sense for q."""
    if window is not None and window < 1:
        raise ShapeError(
            "attention: a query must see at least itself",
            got=f"window={window}",
            need="window >= 1, or None",
            fix="window=None for full attention",
        )
    if softcap is not None and softcap <= 0:
        raise ShapeError(
            "attention: softcap bounds the scores, so it is positive",
            got=f"softcap={softcap}",
            need="softcap > 0, or None",
            fix="softcap=None for no bound",
        )
    if segment_ids is not None and segment_ids.shape != q.shape[:-2]:
        raise ShapeError(
            "attention: segment_ids needs one id per token",
            got=_shapes(segment_ids=segment_ids, q=q),
            need=f"segment_ids {tuple(q.shape[:-2])}",
            fix=f"segment_ids.expand({', '.join(map(str, q.shape[:-2]))})"
            if segment_ids.dim() <= q.dim() - 2
            else f"segment_ids.reshape({', '.join(map(str, q.shape[:-2]))})",
        )


def _shapes(**tensors: Tensor) -> str:
    """Names and shapes. Made for a message only: torch.compile cannot follow it."""
    return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
