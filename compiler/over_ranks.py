"""What operations over a cut dim mean: on all ranks at once, with collectives between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiler import collectives
from compiler.comm import Comm


def rms_norm(comm: Comm, calls: list[tuple[tuple, dict]]) -> list[Tensor]:
    """`rules.rms_norm_over_ranks` on each rank."""
    wides = [x.to(torch.promote_types(x.dtype, torch.float32)) for (x, *_), _ in calls]
    squares = [wide.pow(2).sum(-1, keepdim=True) for wide in wides]
    totals = comm.run(collectives.all_reduce, squares, ())
    totals = comm.run(collectives.vary, totals, ())  # each rank scales another part by it
    return [
        _scaled(x, wide, total / (x.shape[-1] * comm.size), weight, **settings)
        for ((x, weight, _), settings), wide, total in zip(calls, wides, totals, strict=True)
    ]


def _scaled(
    x: Tensor, wide: Tensor, mean: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0
) -> Tensor:
    """As the last lines of `ops.rms_norm`."""
    unit = wide * torch.rsqrt(mean + eps)
    if offset == 0.0:
        return (weight * unit.to(x.dtype)).to(x.dtype)
    return (unit * (offset + weight.to(wide.dtype))).to(x.dtype)
