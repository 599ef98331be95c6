"""The layouts of the CUDA kernels: batch dims folded, heads as wide as a kernel wants them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def fold(t: Tensor, width: int) -> Tensor:
    """(*batch, seq, heads, d) -> (n, seq, heads, width), zeros appended, the last dim dense."""
    if t.shape[-1] != width:
        t = F.pad(t, (0, width - t.shape[-1]))
    if t.stride(-1) != 1:
        t = t.contiguous()
    return t.reshape(-1, *t.shape[-3:])


def unfold(t: Tensor, like: Tensor, width: int) -> Tensor:
    """The inverse of `fold`, with the batch, seq and head dims of `like`."""
    return t[..., :width].reshape(*like.shape[:-1], width)
