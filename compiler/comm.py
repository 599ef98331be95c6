"""How ranks reach each other: all in one process, or one a process over torch.distributed.

Both carry out the nodes of `compiler.collectives`, forward and backward, on a list with the value
of each rank that lives here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compiler import collectives

Values = list[Tensor]


class _Conjugate(torch.autograd.Function):
    """A collective whose backward is another one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(forward: Any, backward: Any, *xs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(forward([x.clone() for x in xs]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.pair = inputs[1], inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        forward, backward = ctx.pair
        # Applied, not called, so that second derivatives pass through collectives too.
        return None, None, *_Conjugate.apply(forward, backward, *grads)


class Comm:
    """The ranks of one mesh axis. Subclasses say how to sum and how to gather.

    Args:
        size: how many ranks there are.
        ranks: those that live in this process.
    """

    def __init__(self, size: int, ranks: list[int]) -> None:
        self.size = size
        self.ranks = ranks

    def total(self, xs: Values) -> Values:
        """The sum over all ranks, for each rank here."""
        raise NotImplementedError

    def everyone(self, xs: Values) -> list[Values]:
        """The values of all ranks in order, for each rank here."""
        raise NotImplementedError

    def run(self, target: Any, xs: Values, args: tuple) -> Values:
        """Carry out a collective node; args are its own without value and axis."""
        forward, backward = _PAIRS[target](self, *args)
        return list(_Conjugate.apply(forward, backward, *xs))  # type: ignore[arg-type]

    def replicas(self, units: int) -> int:
        """On how many ranks each of `units` blocks lies."""
        return max(1, self.size // units)

    def block(self, x: Tensor, rank: int, dim: int, units: int) -> Tensor:
        """A rank's own block of a whole value."""
        n = self.size // self.replicas(units)
        width = x.shape[dim] // n
        return x.narrow(dim, rank // self.replicas(units) * width, width)

    def blocks(self, xs: Values, dim: int, units: int) -> Values:
        return [self.block(x, r, dim, units) for x, r in zip(xs, self.ranks, strict=True)]

    def whole(self, xs: Values, dim: int, units: int) -> Values:
        """The whole value from everyone's blocks, each counted once."""
        step = self.replicas(units)
        return [torch.cat(values[::step], dim) for values in self.everyone(xs)]

    def group_sum(self, xs: Values, units: int) -> Values:
        """The sum over the ranks that hold the same block."""
        step = self.replicas(units)
        if step == 1:
            return xs
        starts = [rank // step * step for rank in self.ranks]
        return [
            torch.stack(values[start : start + step]).sum(0)
            for values, start in zip(self.everyone(xs), starts, strict=True)
        ]


Pair = tuple[Callable[[Values], Values], Callable[[Values], Values]]


def _same(xs: Values) -> Values:
    return xs


def _all_reduce(comm: Comm) -> Pair:
    return comm.total, _same


def _vary(comm: Comm) -> Pair:
    return _same, comm.total


def _all_gather(comm: Comm, dim: int, units: int) -> Pair:
    def backward(grads: Values) -> Values:
        # The ranks that hold one block share its gradient: their sum is what it is.
        return [g / comm.replicas(units) for g in comm.blocks(grads, dim, units)]

    return lambda xs: comm.whole(xs, dim, units), backward


def _take_block(comm: Comm, dim: int, units: int) -> Pair:
    def backward(grads: Values) -> Values:
        return comm.whole(comm.group_sum(grads, units), dim, units)

    return lambda xs: comm.blocks(xs, dim, units), backward


def _replica_sum(comm: Comm, units: int) -> Pair:
    return _same, lambda grads: comm.group_sum(grads, units)


_PAIRS: dict[Any, Callable[..., Pair]] = {
    collectives.all_reduce: _all_reduce,
    collectives.vary: _vary,
    collectives.all_gather: _all_gather,
    collectives.take_block: _take_block,
    collectives.replica_sum: _replica_sum,
}


class Simulated(Comm):
    """All ranks in one process, in lock step."""

    def __init__(self, size: int) -> None:
        super().__init__(size, list(range(size)))

    def total(self, xs: Values) -> Values:
        whole = torch.stack(xs).sum(0)
        return [whole.clone() for _ in xs]

    def everyone(self, xs: Values) -> list[Values]:
        return [xs for _ in xs]


class Processes(Comm):
    """One rank a process, over a process group of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_world_size(group), [dist.get_rank(group)])
        self.group = group

    def total(self, xs: Values) -> Values:
        (x,) = xs
        x = x.contiguous().clone()
        dist.all_reduce(x, group=self.group)
        return [x]

    def everyone(self, xs: Values) -> list[Values]:
        (x,) = xs
        out = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(out, x.contiguous(), group=self.group)
        return [out]
