"""ATen's flash kernel for CPUs on packed rows, one document at a time.

With a mask the kernel computes all scores of a row, and has no use for `causal`; one by one, those
of the documents alone.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from funcmodels.ops.attention_documents import Documents, documents
from funcmodels.ops.attention_kernel import Call

# Shorter ones, on the average, take longer to call the kernel for than what they spare.
SHORT = 16


def documents_of(call: Call) -> Documents | None:
    """The documents to go through one by one; None where a mask says more, or is the faster way."""
    x, segment_ids, rules = call
    if segment_ids is None or rules.window is not None or x.slopes is not None:
        return None
    # What is recorded is for other documents too.
    if is_fake(x.q) or get_proxy_mode() is not None:
        return None
    found = documents(segment_ids, x.q.shape[:-3])
    if found is None or SHORT * (len(found.starts) - 1) > x.q.shape[:-2].numel():
        return None
    return found


def forward(
    q: Tensor, k: Tensor, v: Tensor, at: Documents, *, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Out (n, heads, seq, d) and lse (n, heads, seq), of q, k, v laid out so."""
    n, heads, seq, _ = q.shape
    flat = [_tokens(t) for t in (q, k, v)]
    out, lse = torch.empty_like(flat[0]), None
    for one in _slices(at):
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_one(t, one) for t in flat), 0.0, causal, scale=scale
        )
        out[one] = result[0].transpose(0, 1)
        if lse is None:
            lse = sums.new_empty((n * seq, heads))
        lse[one] = sums.reshape(heads, -1).mT
    assert lse is not None, "a row has a document"
    return _rows(out, n), lse.view(n, seq, heads).transpose(1, 2)


def backward(
    tensors: tuple[Tensor, ...],
    lse: Tensor,
    at: Documents,
    *,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by q, k and v, from (grad_out, q, k, v, out), all of (n, heads, seq, d)."""
    flat = [_tokens(t) for t in tensors]
    sums = lse.transpose(1, 2).reshape(-1, lse.shape[1])  # (tokens, heads)
    found = [torch.empty_like(t) for t in flat[1:4]]
    for one in _slices(at):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_one(t, one) for t in flat), sums[one].mT[None], 0.0, causal, scale=scale
        )
        for whole, grad in zip(found, grads, strict=True):
            whole[one] = grad[0].transpose(0, 1)
    by_q, by_k, by_v = (_rows(t, len(tensors[0])) for t in found)
    return by_q, by_k, by_v


def _slices(at: Documents) -> list[slice]:
    starts = at.starts.tolist()
    return [slice(*ends) for ends in itertools.pairwise(starts)]


def _tokens(t: Tensor) -> Tensor:
    """(n, heads, seq, d) -> (tokens, heads, d), contiguous."""
    return t.transpose(1, 2).flatten(0, 1).contiguous()


def _rows(t: Tensor, n: int) -> Tensor:
    """The inverse."""
    return t.unflatten(0, (n, -1)).transpose(1, 2)


def _one(t: Tensor, tokens: slice) -> Tensor:
    """A document as the kernel takes it: (1, heads, tokens, d)."""
    return t[tokens].transpose(0, 1)[None]
