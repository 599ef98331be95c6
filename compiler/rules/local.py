"""What a partitioned program says of one rank's part, beside sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LocalValues:
    """A tuple of numbers, one a unit, of which each rank takes its own block."""

    values: tuple[float, ...]
    axis: str

    def at(self, rank: int, parts: int) -> tuple[float, ...]:
        n = len(self.values) // parts
        return self.values[rank * n : (rank + 1) * n]


def rms_norm_over_ranks(
    x: Tensor,
    weight: Tensor,
    axis: str,
    *,
    eps: float,
    offset: float = 0.0,
    rounds_once: bool = False,
) -> Tensor:
    """`ops.rms_norm` over a dim that is cut, each rank with its part of the weight.

    The ranks sum their squares, and no more.
    """
    raise AssertionError("rms_norm_over_ranks is carried out by compiler.over_ranks")


def widened(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def more_than_zero(x: Tensor) -> Tensor:
    """x + eps as `F.rms_norm` adds it where it is given none: that of the dtype it computes in."""
    return x + torch.finfo(x.dtype).eps


def max_over_ranks(x: Tensor, dim: int, least: bool, axis: str) -> Tensor:
    """The largest, or the least, over a dim that is cut; the dim is kept, of size 1."""
    raise AssertionError("max_over_ranks is carried out by compiler.over_ranks")


def share_of_mean(x: Tensor, dim: int, keepdim: bool, part: int, count: int) -> Tensor:
    """What `part` of `count` elements of a dim add to the mean of all."""
    return x.mean(dim, keepdim) * (part / count)


def vocab_embed(tokens: Tensor, table: Tensor, vocab: int, axis: str) -> Tensor:
    """Rows of a vocabulary that is cut by rows: zeros for tokens of other ranks."""
    raise AssertionError("vocab_embed has no meaning outside compiler.evaluate")
