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


def sum_of_squares(x: Tensor) -> Tensor:
    """Over the last dim, in float32 at least: what a root-mean-square norm needs of all ranks."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.pow(2).sum(-1, keepdim=True)


def scaled_to_unit(
    x: Tensor, squares: Tensor, weight: Tensor, *, count: int, eps: float, offset: float = 0.0
) -> Tensor:
    """`ops.rms_norm` of `count` elements, of which x is a part; their squares sum to `squares`."""
    unit = x.to(squares.dtype) * torch.rsqrt(squares / count + eps)
    if offset == 0.0:
        return (weight * unit.to(x.dtype)).to(x.dtype)
    return (unit * (offset + weight.to(squares.dtype))).to(x.dtype)


def share_of_mean(x: Tensor, dim: int, keepdim: bool, part: int, count: int) -> Tensor:
    """What `part` of `count` elements of a dim add to the mean of all."""
    return x.mean(dim, keepdim) * (part / count)


def vocab_embed(tokens: Tensor, table: Tensor, vocab: int, axis: str) -> Tensor:
    """Rows of a vocabulary that is cut by rows: zeros for tokens of other ranks."""
    raise AssertionError("vocab_embed has no meaning outside compiler.evaluate")
