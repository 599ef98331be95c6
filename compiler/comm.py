"""How ranks reach each other: all in one process, or one a process over torch.distributed.

Both carry out the nodes of `compiler.collectives`, forward and backward, on a list with the value
of each rank that lives here.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from compiler import collectives

Values = list[Tensor]


class Collective(torch.autograd.Function):
    """A collective whose backward is another one, of (comm, node, args, transposed, *values).

    The first four are plain values, so that a compiled graph can hold them: the name of the ranks,
    the name of the collective, its arguments without value and axis, and whether this is its
    backward.
    """

    @staticmethod
    def forward(comm: str, name: str, args: tuple, transposed: bool, *xs: Tensor) -> Any:  # type: ignore[override]
        pair = _PAIRS[name](_COMMS[comm], *args)
        return tuple(pair[transposed](list(xs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.call = inputs[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        comm, name, args, transposed = ctx.call
        # Applied, not called, so that second derivatives pass through collectives too.
        return None, None, None, None, *Collective.apply(comm, name, args, not transposed, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return Collective.apply(*ctx.call, *tangents[4:])  # all of them are linear

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        comm, name, args, back, *xs = inputs
        if name in _OF_DIM:
            args = (args[0] + 1, *args[1:])
        dims = in_dims[4:]
        firsts = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(xs, dims, strict=True)
        ]
        return Collective.apply(comm, name, args, back, *firsts), (0,) * len(xs)


# `apply` asks for the signature of forward at every call. And torch.compile records each call
# whole: AOTAutograd follows the rules above.
Collective.forward.__signature__ = inspect.signature(Collective.forward)  # type: ignore[attr-defined]
torch.compiler.allow_in_graph(Collective)

_COMMS: WeakValueDictionary[str, Comm] = WeakValueDictionary()
_NUMBERS = itertools.count()


class Comm:
    """The ranks of one mesh axis. Subclasses say how to sum and how to gather.

    Args:
        size: how many ranks there are.
        ranks: those that live in this process.
    """

    def __init__(self, size: int, ranks: list[int]) -> None:
        self.size = size
        self.ranks = ranks
        self.flying: Values = []
        self.name = f"comm{next(_NUMBERS)}"
        _COMMS[self.name] = self

    def total(self, xs: Values) -> Values:
        """The sum over all ranks, for each rank here."""
        raise NotImplementedError

    def everyone(self, xs: Values) -> list[Values]:
        """The values of all ranks in order, for each rank here."""
        raise NotImplementedError

    def scattered(self, xs: Values, dim: int) -> Values:
        """The own one of equal blocks along a dim of the sum over all ranks, for each rank here."""
        totals = zip(self.total(xs), self.ranks, strict=True)
        return [x.chunk(self.size, dim)[rank] for x, rank in totals]

    def start_totals(self, xs: Values) -> Values:
        """The sum over all ranks of each, not to be read before `wait`."""
        raise NotImplementedError

    def run(self, target: Any, xs: Values, args: tuple) -> Values:
        """Carry out a collective node; args are its own without value and axis."""
        return self.call(target.__name__, xs, *args)

    def call(self, name: str, xs: Values, *args: int) -> Values:
        """Carry out a collective by its name."""
        return list(Collective.apply(self.name, name, args, False, *xs))  # type: ignore[arg-type]

    def replicas(self, units: int) -> int:
        """On how many ranks each of `units` blocks lies."""
        return max(1, self.size // units)

    def block(self, x: Tensor, rank: int, dim: int, units: int) -> Tensor:
        """A rank's own block of a whole value."""
        n = self.size // self.replicas(units)
        width = x.shape[dim] // n
        return x.narrow(dim, rank // self.replicas(units) * width, width)

    def blocks(self, xs: Values, dim: int, units: int) -> Values:
        return [_own(self.block(x, r, dim, units)) for x, r in zip(xs, self.ranks, strict=True)]

    def whole(self, xs: Values, dim: int, units: int) -> Values:
        """The whole value from everyone's blocks, each counted once."""
        step = self.replicas(units)
        return [torch.cat(values[::step], dim) for values in self.everyone(xs)]

    def group_sum(self, xs: Values, units: int) -> Values:
        """The sum over the ranks that hold the same block."""
        step = self.replicas(units)
        if step == 1:
            return _same(xs)
        starts = [rank // step * step for rank in self.ranks]
        return [
            torch.stack(values[start : start + step]).sum(0)
            for values, start in zip(self.everyone(xs), starts, strict=True)
        ]


Pair = tuple[Callable[[Values], Values], Callable[[Values], Values]]


def _own(x: Tensor) -> Tensor:
    """The same memory, not marked as a view: autograd refuses views that a Function makes."""
    return torch.ops.aten._unsafe_view(x, x.shape)


def _same(xs: Values) -> Values:
    return list(map(_own, xs))


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


def _reduce_scatter(comm: Comm, dim: int) -> Pair:
    return lambda xs: comm.scattered(xs, dim), lambda grads: comm.whole(grads, dim, comm.size)


def _gather_vary(comm: Comm, dim: int) -> Pair:
    forward, backward = _reduce_scatter(comm, dim)
    return backward, forward


def _vary_late(comm: Comm) -> Pair:
    return _same, lambda grads: comm.start_totals(grads)


def _landed(comm: Comm) -> Pair:
    def backward(grads: Values) -> Values:
        comm.flying.clear()
        return _same([wait(g) for g in grads])

    return _same, backward


_PAIRS: dict[str, Callable[..., Pair]] = {
    collectives.all_reduce.__name__: _all_reduce,
    collectives.vary.__name__: _vary,
    collectives.all_gather.__name__: _all_gather,
    collectives.take_block.__name__: _take_block,
    collectives.replica_sum.__name__: _replica_sum,
    collectives.reduce_scatter.__name__: _reduce_scatter,
    collectives.gather_vary.__name__: _gather_vary,
    # A `vary` whose sums are only started; what they came through before must be `landed`.
    "vary_late": _vary_late,
    "landed": _landed,
}
_OF_DIM = ("all_gather", "take_block", "reduce_scatter", "gather_vary")  # args[0] is a dim


class Simulated(Comm):
    """All ranks in one process, in lock step."""

    def __init__(self, size: int) -> None:
        super().__init__(size, list(range(size)))

    def total(self, xs: Values) -> Values:
        whole = torch.stack(xs).sum(0)
        return [whole.clone() for _ in xs]

    def everyone(self, xs: Values) -> list[Values]:
        return [xs for _ in xs]


_c10d = torch.ops._c10d_functional  # what torch.compile knows: a start, and a wait


class Processes(Comm):
    """One rank a process, over a process group of torch.distributed, known by its name.

    The group itself is not kept: a model lives in reference cycles, and a group in one of them
    outlives `destroy_process_group` with its threads, which can abort a process as it ends.

    On CPUs, over gloo, a collective waits for the one before. A gloo group has two threads, and
    with torch 2.13 about one process in fifty breaks its heap when both gather at once: it dies in
    `malloc`, or in gloo's `Pair::recv`, of what was freed twice.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_world_size(group), [dist.get_rank(group)])
        self.group = group.group_name
        self.before: Callable[[], Tensor | None] = lambda: None

    def __reduce__(self) -> Any:
        """A copied module is on the same ranks, and a saved one on those of a group of the name."""
        return _over_group, (self.group,)

    @property
    def rank(self) -> int:
        return self.ranks[0]

    def total(self, xs: Values) -> Values:
        (x,) = xs
        return [wait(self.start_total(x))]

    def everyone(self, xs: Values) -> list[Values]:
        (x,) = xs
        flat = wait(self.start_gather(x.reshape(1, *x.shape)))
        return [list(flat.unbind(0))]

    def whole(self, xs: Values, dim: int, units: int) -> Values:
        (x,) = xs
        if self.replicas(units) > 1:
            return super().whole(xs, dim, units)
        if all(n == 1 for n in x.shape[:dim]):  # blocks lie one after the other as they come
            return [wait(self.start_gather(x.movedim(dim, 0))).movedim(0, dim)]
        out = wait(self.start_gather(x)).unflatten(0, (self.size, x.shape[0]))
        return [out.movedim(0, dim).flatten(dim, dim + 1)]

    def scattered(self, xs: Values, dim: int) -> Values:
        (x,) = xs
        parts = x.unflatten(dim, (self.size, -1)).movedim(dim, 0)  # (ranks, *shape of one block)
        return [wait(self.start_scatter(parts.reshape(-1, *parts.shape[2:]))).view(parts.shape[1:])]

    # Collectives that are only started: `wait` for the result before its use.

    def late(self, x: Tensor) -> Tensor:
        """A started collective, but for two of which all are waited for: they hold what is sent."""
        if type(x) is Tensor:  # not while a graph is recorded
            self.flying.append(x)
            while len(self.flying) > 2:
                wait(self.flying.pop(0))
        return x

    def start_totals(self, xs: Values) -> Values:
        flat = self.late(self.start_total(torch.cat([x.reshape(-1) for x in xs])))  # of one dtype
        parts = flat.split([x.numel() for x in xs])
        return [_own(part.view(x.shape)) for part, x in zip(parts, xs, strict=True)]

    def _start(self, collective: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        queued = x.device.type == "cpu" and type(x) is Tensor  # not while a graph is recorded
        if queued and (before := self.before()) is not None:
            wait(before)
        result = collective(x.contiguous(), *args, self.group, **options)
        if queued:
            self.before = ref(result)  # who has not waited for it, holds it
        return result

    def start_total(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        return self._start(_c10d.all_reduce, x, "sum")

    def start_gather(self, x: Tensor) -> Tensor:
        """Every rank's x, one after the other along the first dim."""
        return self._start(_c10d.all_gather_into_tensor, x, self.size)

    def start_gather_into(self, x: Tensor, out: Tensor) -> Tensor:
        """The same, into memory that is there."""
        return self._start(_c10d.all_gather_into_tensor_out, x, self.size, out=out)

    def start_scatter(self, x: Tensor) -> Tensor:
        """The own one of equal blocks along the first dim of the sum over the ranks."""
        return self._start(_c10d.reduce_scatter_tensor, x, "sum", self.size)


_OVER: dict[tuple[str, int, int], Processes] = {}


def over(group: dist.ProcessGroup) -> Processes:
    """The processes of a group, which stay known: a gradient may come after all its modules."""
    key = group.group_name, dist.get_world_size(group), dist.get_rank(group)
    if key not in _OVER:
        _OVER[key] = Processes(group)
    return _OVER[key]


def _over_group(name: str) -> Processes:
    return over(dist.distributed_c10d._resolve_process_group(name))  # type: ignore[arg-type]


def wait(x: Tensor) -> Tensor:
    """The result of a collective that was started."""
    return _c10d.wait_tensor(x)
