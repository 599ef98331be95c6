"""What the autograd rules of several ops share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def batched(tensors, in_dims, size: int, full) -> list[Tensor | None]:
    """Each with the vmapped dim first; where it had none, expanded if full, or of size 1."""
    result = []
    for t, dim, is_full in zip(tensors, in_dims, full, strict=False):
        if t is None:
            result.append(None)
        elif dim is None:
            result.append(t.expand(size if is_full else 1, *t.shape))
        else:
            result.append(t.movedim(dim, 0))
    return result


def no_view(t: Tensor) -> Tensor:
    """The same memory, no longer marked as a view: forward mode asserts on views made inside."""
    return torch.ops.aten._unsafe_view(t, t.shape)


def is_last_derivative() -> bool:
    """Whether nothing differentiates or vectorises this backward: it needs no rules of its own."""
    return not (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
