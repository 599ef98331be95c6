"""ATen's flash kernel for CPUs on packed rows, document by document.

With a mask the kernel computes all scores of a row, and has no use for `causal`; document by
document, those of the documents alone. Documents of about one length are one batch: the kernel's
threads share out heads of documents, and one document has fewer heads than a machine has threads.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from funcmodels.ops.attention_cpu_dtype import gradient_dtype
from funcmodels.ops.attention_documents import Documents, documents
from funcmodels.ops.attention_kernel import Call

# Shorter ones, on the average, take longer to call the kernel for than what they spare.
SHORT = 16
# How full a group of documents is at least: at 0.75, the scores of which none is used are few.
FILLED = 0.75
# A group has as many documents as give each thread so many heads; more would only leave the cache.
HEADS = 4


def documents_of(call: Call) -> Documents | None:
    """The documents to go through; None where a mask says more, or is the faster way."""
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
    for group in _groups(at, heads, causal=causal):
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(group.of(t).transpose(1, 2) for t in flat), 0.0, causal, scale=scale
        )
        group.put(out, result.transpose(1, 2))
        if lse is None:
            lse = sums.new_empty((n * seq, heads))
        group.put(lse, sums.reshape(*result.shape[:-1]).transpose(1, 2))
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
    for group in _groups(at, flat[0].shape[1], causal=causal):
        dtype = gradient_dtype(flat[0].dtype, group.length)
        grad_out, *others = (group.of(t).transpose(1, 2).to(dtype) for t in flat)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            group.zero_past_ends(grad_out),
            *others,
            group.of(sums).transpose(1, 2),
            0.0,
            causal,
            scale=scale,
        )
        for whole, grad in zip(found, grads, strict=True):
            group.put(whole, grad.transpose(1, 2).to(whole.dtype))
    by_q, by_k, by_v = (_rows(t, len(tensors[0])) for t in found)
    return by_q, by_k, by_v


class Group(NamedTuple):
    """Documents of about one length, of which the kernel makes one batch.

    Where causal, the tokens of a document see nothing of what follows it: shorter ones are filled
    up with their last token, and what the kernel gives for that is left out.
    """

    tokens: Tensor | slice  # (documents, length): where they lie; of one document, a slice
    is_real: Tensor | None  # (documents, length); None where all are
    length: int

    def of(self, t: Tensor) -> Tensor:
        """(tokens, ...) -> (documents, length, ...)."""
        return t[self.tokens][None] if isinstance(self.tokens, slice) else t[self.tokens]

    def put(self, whole: Tensor, values: Tensor) -> None:
        """The inverse, into `whole`."""
        if isinstance(self.tokens, slice):
            whole[self.tokens] = values[0]
        elif self.is_real is None:
            whole[self.tokens] = values
        else:
            whole[self.tokens[self.is_real]] = values[self.is_real]

    def zero_past_ends(self, t: Tensor) -> Tensor:
        """t (documents, heads, length, d), 0 where there are no tokens."""
        return t if self.is_real is None else t * self.is_real[:, None, :, None]


def _groups(at: Documents, heads: int, *, causal: bool) -> list[Group]:
    """The documents, longest first, in groups that are at least `FILLED` full."""
    most = -(-HEADS * torch.get_num_threads() // heads)
    ends = sorted(itertools.pairwise(at.starts.tolist()), key=lambda ends: ends[0] - ends[1])
    groups: list[list[tuple[int, int]]] = []
    longest = 0
    for start, end in ends:
        least = FILLED * longest if causal else longest
        if groups and len(groups[-1]) < most and end - start >= least:
            groups[-1].append((start, end))
        else:
            longest = end - start
            groups.append([(start, end)])
    return [_group(group) for group in groups]


def _group(documents: list[tuple[int, int]]) -> Group:
    """The group of some documents, the longest first."""
    first, end = documents[0]
    if len(documents) == 1:
        return Group(slice(first, end), None, end - first)
    starts, ends = torch.tensor(documents)[..., None].unbind(1)
    tokens = starts + torch.arange(end - first)
    is_real = tokens < ends
    return Group(tokens.minimum(ends - 1), None if is_real.all() else is_real, end - first)


def _tokens(t: Tensor) -> Tensor:
    """(n, heads, seq, d) -> (tokens, heads, d), contiguous."""
    return t.transpose(1, 2).flatten(0, 1).contiguous()


def _rows(t: Tensor, n: int) -> Tensor:
    """The inverse."""
    return t.unflatten(0, (n, -1)).transpose(1, 2)
