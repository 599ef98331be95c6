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
    x: Tensor,
    wide: Tensor,
    mean: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    rounds_once: bool = False,
) -> Tensor:
    """As the last lines of `ops.rms_norm`."""
    unit = wide * torch.rsqrt(mean + eps)
    if offset == 0.0 and not rounds_once:
        return (weight * unit.to(x.dtype)).to(x.dtype)
    return (unit * (offset + weight.to(wide.dtype))).to(x.dtype)


def max_over_ranks(comm: Comm, calls: list[tuple[tuple, dict]]) -> list[Tensor]:
    """`rules.max_over_ranks` on each rank; its gradient goes to all that are the largest alike."""
    (_, dim, least, _), _ = calls[0]
    reduce = torch.amin if least else torch.amax
    xs = [x for (x, *_), _ in calls]
    parts = [reduce(x.detach(), dim, keepdim=True) for x in xs]
    parts = comm.run(collectives.all_gather, parts, (dim % parts[0].ndim, comm.size))
    tops = [reduce(part, dim, keepdim=True) for part in parts]
    if not (torch.is_grad_enabled() and xs[0].is_floating_point()):
        return tops
    ties = [x.detach() == top for x, top in zip(xs, tops, strict=True)]
    counts = [tie.to(x.dtype).sum(dim, keepdim=True) for tie, x in zip(ties, xs, strict=True)]
    counts = comm.run(collectives.all_reduce, counts, ())
    return [
        _Chosen.apply(top, x, tie / count)
        for top, x, tie, count in zip(tops, xs, ties, counts, strict=True)
    ]


class _Chosen(torch.autograd.Function):
    """A value that was chosen among others, to which its gradient goes in shares."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, among: Tensor, shares: Tensor) -> Tensor:  # type: ignore[override]
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (shares,) = ctx.saved_tensors
        return None, grad * shares, None
