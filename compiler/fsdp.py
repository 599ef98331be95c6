"""Fully sharded parameters: gathered for one part of a program, freed after it, gathered again.

`Gather` is the communication: all parameters of a part in one all-gather, their gradients in one
reduce-scatter. `Unit` is the part that uses them. Eagerly, it keeps its own piece of the autograd
graph, whose saved parameters are emptied after the forward and filled again before the backward;
the next part's gather runs meanwhile. Under torch.compile, vmap and forward mode the gather is a
plain operation of the graph, as it is for derivatives of derivatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge

from compiler.comm import Processes, wait
from compiler.mesh import Cut
from funcmodels.remat import remat

Tensors = list[Tensor]

# A parameter of so many bytes is sent by itself, from its own memory into its own: beside the time
# that takes, a call costs nothing, and a copy of a large vocabulary's table would be the peak.
LARGE = 4 << 20


class Gather:
    """The parameters of one part, between the shards of this rank and the whole tensors.

    Args:
        comm: the fsdp ranks.
        cuts: how each parameter is cut; None for one that every rank has whole.
        lands: whether what gets a parameter's gradient waits for it; else it is waited for here.
    """

    def __init__(self, comm: Processes, cuts: list[Cut | None], lands: list[bool]) -> None:
        self.comm = comm
        self.cuts = cuts
        self.lands = lands

    def __call__(self, shards: Tensors) -> Tensors:
        """Whole parameters, differentiable: the gradient of each shard is summed over ranks."""
        out: list[Any] = [None] * len(shards)
        for at in self._groups(shards):
            (flat,) = self.comm.call("gather_vary", [self._flat(shards, at)], 0)
            for i, value in self._split(flat, at, shards):
                out[i] = value
        for i, (shard, cut) in enumerate(zip(shards, self.cuts, strict=True)):
            if cut is None:
                floating = shard.is_floating_point()
                out[i] = self.comm.call("vary", [shard])[0] if floating else shard
        return out

    def start(self, shards: Tensors, into: Tensors | None = None) -> Tensors:
        """Start to gather; for `finish`.

        Large parameters go to the freed ones of `into`, where those are given.
        """
        started = []
        for at in self._groups(shards):
            flat = self._flat(shards, at)
            one = len(at) == 1 and self._by_itself(at[0], flat.nbytes * self.comm.size)
            if into is None or not one:
                started.append(self.comm.start_gather(flat))
                continue
            whole = _with_memory(into[at[0]])
            started.append(self.comm.start_gather_into(flat, whole.view(-1)))
        return started

    def finish(self, started: Tensors, shards: Tensors) -> Tensors:
        """Whole parameters from what was started, without a graph; each of its own memory."""
        out = list(shards)
        for flat, at in zip(started, self._groups(shards), strict=True):
            for i, value in self._split(wait(flat), at, shards):
                alone = value.untyped_storage().nbytes() == value.nbytes
                out[i] = value if alone else value.clone()
        return out

    def scatter(self, grads: list[Any], *, waits: bool) -> list[Any]:
        """The gradients of the shards from those of the whole parameters, summed over ranks.

        None where there is none, on every rank. Unless it waits, they are on their way.
        """
        out: list[Any] = [None] * len(grads)
        for at in self._groups(grads):
            by_rank = [self._cut(i).rows(grads[i]) for i in at]
            sizes = [parts.shape[1:] for parts in by_rank]
            rows = [parts.reshape(len(parts), -1) for parts in by_rank]
            widths = [row.shape[1] for row in rows]
            sent = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
            del by_rank, rows
            flat = self.comm.late(self.comm.start_scatter(sent.view(-1)))
            del sent
            for i in at:
                grads[i] = None
            if waits or not all(self.lands[i] for i in at):
                wait(flat)
            for i, piece, size in zip(at, flat.split(widths), sizes, strict=True):
                cut = self._cut(i)
                own = cut.part(self.comm.rank)[1]
                out[i] = piece.view(size).narrow(cut.dim, 0, own)
        for i, cut in enumerate(self.cuts):
            if cut is None and grads[i] is not None:
                out[i] = wait(self.comm.start_total(grads[i]))
        return out

    def _cut(self, i: int) -> Cut:
        cut = self.cuts[i]
        assert cut is not None
        return cut

    def _groups(self, tensors: list[Any]) -> list[list[int]]:
        """The places of the cut parameters, of one dtype together, but for large ones."""
        groups: dict[Any, list[int]] = {}
        for i, (tensor, cut) in enumerate(zip(tensors, self.cuts, strict=True)):
            if cut is not None and tensor is not None:
                whole = tensor.nbytes // tensor.shape[cut.dim] * cut.size if tensor.nbytes else 0
                key = i if self._by_itself(i, whole) else tensor.dtype
                groups.setdefault(key, []).append(i)
        return list(groups.values())

    def _by_itself(self, i: int, nbytes: int) -> bool:
        """Whether a parameter, of so many bytes when whole, is sent without being copied."""
        cut = self._cut(i)
        return nbytes >= LARGE and cut.dim == 0 and cut.size % cut.parts == 0

    def _flat(self, shards: Tensors, at: list[int]) -> Tensor:
        """Shards one after the other, each filled up to the same size on every rank."""
        each = [self._cut(i).filled(shards[i]).reshape(-1) for i in at]
        return each[0] if len(each) == 1 else torch.cat(each)

    def _split(self, flat: Tensor, at: list[int], shards: Tensors) -> Iterator[tuple[int, Tensor]]:
        """Whole parameters out of all ranks' flat shards."""
        rows = flat.view(self.comm.size, -1)
        first = 0
        for i in at:
            cut = self._cut(i)
            size = list(shards[i].shape)
            size[cut.dim] = cut.width
            last = first + torch.Size(size).numel()
            parts = rows[:, first:last].unflatten(1, size).movedim(0, cut.dim)
            value = parts.flatten(cut.dim, cut.dim + 1)
            yield i, value if cut.size % cut.parts == 0 else value.narrow(cut.dim, 0, cut.size)
            first = last


@dataclass(eq=False)
class Run:
    """One run of a program: its calls of units, and what is gathered ahead of its use."""

    calls: list[_Call] = field(default_factory=list)
    started: dict[Any, Tensors] = field(default_factory=dict)

    def ahead(self, key: Any, unit: Unit, shards: Tensors, into: Tensors | None = None) -> None:
        """Start to gather what will be needed next; `into`, see `Gather.start`."""
        if key not in self.started:
            self.started[key] = unit.gather.start(shards, into)

    def take(self, key: Any, unit: Unit, shards: Tensors, into: Tensors | None = None) -> Tensors:
        """Whole parameters, started before or now."""
        self.ahead(key, unit, shards, into)
        return unit.gather.finish(self.started.pop(key), shards)


class Unit:
    """A part of a program whose parameters are gathered for it.

    Args:
        fn: `fn(*sizes, *inputs, *params) -> tuple`, of whole parameters.
        gather: for its parameters.
        following: the unit that runs after it; None for the last.
        recomputed: keep nothing of the forward but its inputs, and run it again in the backward.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        gather: Gather,
        following: Unit | None,
        *,
        recomputed: bool = False,
    ) -> None:
        self.fn = fn
        self.gather = gather
        self.following = following
        self.recomputed = recomputed

    def __call__(
        self, run: Run, sizes: tuple[int, ...], inputs: Tensors, shards: Tensors, ahead: Tensors
    ) -> tuple[Tensor, ...]:
        """Run it; `ahead` are the shards of the unit that follows."""
        if not _only_reverse():
            return self.plain(sizes, inputs, shards)
        every = functorch.peek_interpreter_stack() is not None
        needs = [_has_gradient(x) and (every or x.requires_grad) for x in (*inputs, *shards)]
        call = _Call(self, run, sizes, len(inputs), needs, keeps=torch.is_grad_enabled())
        return _Forward.apply(call, *inputs, *shards, *[x.detach() for x in ahead])  # type: ignore[return-value]

    def plain(self, sizes: tuple[int, ...], inputs: Tensors, shards: Tensors) -> tuple[Tensor, ...]:
        """The same as operations that every transform follows."""
        run = remat(self._plain) if self.recomputed else self._plain
        return run(sizes, inputs, shards)

    def _plain(
        self, sizes: tuple[int, ...], inputs: Tensors, shards: Tensors
    ) -> tuple[Tensor, ...]:
        return self.fn(*sizes, *inputs, *self.gather(shards))


def _has_gradient(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _only_reverse() -> bool:
    """Whether all that may transform this call are reverse-mode derivatives, eagerly."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    stack = functorch.get_interpreter_stack() or []
    return all(level.key() == functorch.TransformType.Grad for level in stack)


@dataclass(eq=False)
class _Call:
    """One call of a unit: what its backward needs beside tensors that autograd keeps."""

    unit: Unit
    run: Run
    sizes: tuple[int, ...]
    n_inputs: int
    needs: list[bool]  # of which inputs and shards gradients are wanted
    keeps: bool
    differentiates: bool = False
    went_back: bool = False
    before: _Call | None = None
    shards: Tensors = field(default_factory=list)
    leaves: Tensors = field(default_factory=list)  # inputs and whole parameters
    outputs: list[Any] = field(default_factory=list)  # where the graph of each result ends

    def split(self, tensors: Any) -> tuple[Tensors, Tensors, Tensors]:
        """Inputs, shards, and the next unit's shards."""
        n, m = self.n_inputs, len(self.needs)
        return list(tensors[:n]), list(tensors[n:m]), list(tensors[m:])

    def forward(self, tensors: Any) -> tuple[Tensor, ...]:
        inputs, self.shards, ahead = self.split(tensors)
        unit, run = self.unit, self.run
        params = run.take(len(run.calls), unit, self.shards)
        self.before = run.calls[-1] if run.calls else None
        run.calls.append(self)
        if unit.following is not None:
            run.ahead(len(run.calls), unit.following, ahead)
        if not self.keeps or unit.recomputed:
            return tuple(_own(x) for x in unit.fn(*self.sizes, *inputs, *params))
        results = self.graph(inputs, params)
        freed = {param.untyped_storage()._cdata for param in self.params}
        results = [x.clone() if x.untyped_storage()._cdata in freed else x for x in results]
        for param in self.params:
            _free(param)
        return tuple(map(_own, results))

    @property
    def params(self) -> Iterator[Tensor]:
        """The whole parameters that are gathered, and not this rank's own."""
        cuts = self.unit.gather.cuts
        return itertools.compress(self.leaves[self.n_inputs :], [cut is not None for cut in cuts])

    @property
    def freed(self) -> Tensors | None:
        """The whole parameters that the graph kept, without their memory."""
        return self.leaves[self.n_inputs :] if self.outputs else None

    def graph(self, inputs: Tensors, params: Tensors) -> Tensors:
        """Run the part, keeping its own piece of the graph."""
        with torch.enable_grad():
            self.leaves = [
                x.detach().requires_grad_(needed)
                for x, needed in zip((*inputs, *params), self.needs, strict=True)
            ]
            results = list(self.unit.fn(*self.sizes, *self.leaves))
            self.outputs = [get_gradient_edge(x) if x.requires_grad else None for x in results]
        return results

    def backward(self, tensors: Any, grads: Tensors) -> Tensors:
        """The gradients of the inputs and shards that need one."""
        inputs, _, _ = self.split(tensors)
        unit, run = self.unit, self.run
        params = run.take(("backward", id(self)), unit, self.shards, self.freed)
        if (before := self.before) is not None and before.differentiates:
            run.ahead(("backward", id(before)), before.unit, before.shards, before.freed)
        if self.outputs:
            own = itertools.compress(params, [cut is not None for cut in unit.gather.cuts])
            for empty, param in zip(self.params, own, strict=True):
                if not empty.untyped_storage().nbytes():
                    _fill(empty, param)
        else:
            self.graph(inputs, params)
        del params
        needed = list(itertools.compress(self.leaves, self.needs))
        pairs = [(x, g) for x, g in zip(self.outputs, grads, strict=True) if x is not None]
        found = torch.autograd.grad(
            [x for x, _ in pairs],
            needed,
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
        self.leaves, self.outputs = [], []  # the graph was used up
        rest = iter(found)
        every = [next(rest) if needed else None for needed in self.needs]
        del found, rest, needed, pairs
        # In a backward of a backward, this is not all there is of these gradients: they are added
        # to others before anything waits for them. It is the call's second.
        waits, self.went_back = self.went_back, True
        grads_of_whole = every[self.n_inputs :]
        del every[self.n_inputs :]
        every += unit.gather.scatter(grads_of_whole, waits=waits)
        return [_own(x) for x in every if x is not None]

    def again(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The whole call as operations that every transform follows."""
        inputs, shards, _ = self.split(tensors)
        return tuple(self.unit.plain(self.sizes, inputs, shards))


class _Forward(torch.autograd.Function):
    """The results of a call, of (call, *inputs, *shards, *the next unit's shards)."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Any:  # type: ignore[override]
        return call.forward(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        call, *tensors = inputs
        ctx.call = call
        ctx.set_materialize_grads(True)
        call.differentiates = any(ctx.needs_input_grad)
        ctx.mark_non_differentiable(*[x for x in output if not _has_gradient(x)])
        ctx.save_for_backward(*tensors[: len(call.needs)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        tensors, call = ctx.saved_tensors, ctx.call
        found = iter(_Backward.apply(call, *tensors, *grads))  # type: ignore[arg-type]
        own = (next(found) if needed else None for needed in call.needs)
        n_ahead = len(ctx.needs_input_grad) - 1 - len(tensors)
        return None, *own, *[None] * n_ahead


class _Backward(torch.autograd.Function):
    """The gradients of a call, of (call, *inputs, *shards, *gradients of its results)."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Any:  # type: ignore[override]
        n = len(call.needs)
        return tuple(call.backward(tensors[:n], list(tensors[n:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        """Derivatives of derivatives: the call again, as plain operations."""
        call, tensors = ctx.call, ctx.saved_tensors
        n = len(call.needs)
        own = list(itertools.compress(range(n), call.needs))
        floating = [*own, *(i for i in range(n, len(tensors)) if _has_gradient(tensors[i]))]

        def first(*values: Tensor) -> Any:
            given = list(tensors)
            for i, value in zip(floating, values, strict=True):
                given[i] = value

            def run(*values: Tensor) -> Any:
                args = given[:n]
                for i, value in zip(own, values, strict=True):
                    args[i] = value
                return call.again(*args)

            return torch.func.vjp(run, *[given[i] for i in own])[1](tuple(given[n:]))

        found = iter(torch.func.vjp(first, *[tensors[i] for i in floating])[1](tuple(grads)))
        return None, *[next(found) if i in floating else None for i in range(len(tensors))]


def _own(x: Tensor) -> Tensor:
    """The same memory without a graph, not marked as a view of anything."""
    x = x.detach()
    return torch.ops.aten._unsafe_view(x, x.shape)


def _free(param: Tensor) -> None:
    """Give back a parameter's memory; what autograd saved of it shares the storage."""
    param.untyped_storage().resize_(0)


def _fill(param: Tensor, value: Tensor) -> None:
    """Give a freed parameter its values again."""
    _with_memory(param).copy_(value)


def _with_memory(param: Tensor) -> Tensor:
    """A freed parameter with memory again, to be written.

    It is `data`, whose versions are its own: to autograd, which saved the parameter, nothing has
    changed, and a collective writes when it likes.
    """
    param.untyped_storage().resize_(param.nbytes)
    return param.data
