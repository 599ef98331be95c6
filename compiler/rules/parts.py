"""Taking tensors apart and putting them together."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from compiler.ir import TensorType
from compiler.placement import REPLICATE, Placement, Shard
from compiler.rules.rule import Decision, View, dim_of, rule


@rule(operator.getitem)
def getitem(view: View) -> Decision | None:
    """An element of a tuple, or basic indexing of a tensor that leaves the cut dim whole."""
    x, index = view.node.args
    assert isinstance(x, fx.Node)
    if not isinstance(x.meta["type"], TensorType):
        at = view.placements[x][index]  # type: ignore[index]
        return Decision({}, at)
    parts = index if isinstance(index, tuple) else (index,)
    at, rank = view.at(x), len(view.type(x).shape)
    if any(isinstance(p, (fx.Node, list)) for p in parts):
        return _by_numbers(view, x, parts)
    if not isinstance(at, Shard):
        return Decision({x: at}, at)
    if any(not (isinstance(p, (int, slice)) or p is None or p is Ellipsis) for p in parts):
        return None
    used = sum(p is not None and p is not Ellipsis for p in parts)
    dim = out = 0
    if Ellipsis not in parts:
        parts = (*parts, Ellipsis)
    for part in parts:
        if part is None:
            out += 1
        elif part is Ellipsis:
            if dim <= at.dim < dim + rank - used:
                return Decision({x: at}, Shard(out + at.dim - dim, at.units, at.axis))
            dim, out = dim + rank - used, out + rank - used
        else:
            if dim == at.dim:
                if part != slice(None):
                    return None
                return Decision({x: at}, Shard(out, at.units, at.axis))
            dim, out = dim + 1, out + isinstance(part, slice)
    return None


def _by_numbers(view: View, x: fx.Node, parts: tuple) -> Decision | None:
    """One dim, not the cut one, by a list or a tensor of numbers; the others as they are."""
    rank = len(view.type(x).shape)
    given = [p for p in parts if isinstance(p, (fx.Node, list))]
    rest = [p for p in parts if not isinstance(p, (fx.Node, list))]
    if len(given) > 1 or any(p is not ... and p != slice(None) for p in rest):
        return None
    dim = next(i for i, p in enumerate(parts) if isinstance(p, (fx.Node, list)))
    if any(p is ... for p in parts[:dim]):
        dim += rank - len(parts)
    (index,) = given
    if isinstance(index, fx.Node) and view.type(index).dtype == torch.bool:
        return None
    return _picked(view, x, dim, index)


def _picked(view: View, x: fx.Node, dim: int, index: fx.Node | list | None) -> Decision | None:
    """Elements of a dim by numbers, which are the same on every rank, or of a whole tensor."""
    at, by = view.whole(x), view.whole(index)
    inputs: dict[fx.Node, Placement] = {x: at}
    if isinstance(index, fx.Node):
        inputs[index] = by
    if isinstance(by, Shard):
        if isinstance(at, Shard):
            return None
        return Decision(inputs, Shard(dim + by.dim, by.units, by.axis))
    if not isinstance(at, Shard):
        return Decision(inputs, at)
    if at.dim == dim:
        return None
    grown = len(view.type(view.node).shape) - len(view.type(x).shape)  # numbers of several dims
    return Decision(inputs, Shard(at.dim + (grown if dim < at.dim else 0), at.units, at.axis))


@rule(torch.split, torch.chunk, torch.tensor_split)
def split(view: View) -> Decision | None:
    """Along another dim than the cut one."""
    x = view.tensors[0]
    at, rank = view.at(x), len(view.type(x).shape)
    if isinstance(at, Shard) and at.dim == dim_of(view.arg(2, "dim", 0), rank):
        return None
    return Decision({x: at}, (at,) * len(view.node.meta["type"]))


@rule(torch.index_select)
def index_select(view: View) -> Decision | None:
    """Along another dim than the cut one."""
    x, index = view.node.args[0], view.arg(2, "index")
    assert isinstance(x, fx.Node)
    return _picked(view, x, dim_of(view.arg(1, "dim"), len(view.type(x).shape)), index)


@rule(torch.select, torch.narrow, Tensor.unfold)
def stretch(view: View) -> Decision | None:
    """An element, a stretch, or the windows of another dim than the cut one."""
    x = view.tensors[0]
    at, rank = view.whole(x), len(view.type(x).shape)
    dim = dim_of(view.arg(1, "dim" if view.node.target is not Tensor.unfold else "dimension"), rank)
    if len(view.tensors) > 1 or (isinstance(at, Shard) and at.dim == dim):
        return None
    if isinstance(at, Shard) and view.node.target is torch.select:
        return Decision({x: at}, Shard(at.dim - (dim < at.dim), at.units, at.axis))
    return Decision({x: at}, at)


@rule(torch.unbind)
def unbind(view: View) -> Decision | None:
    x = view.tensors[0]
    at, rank = view.at(x), len(view.type(x).shape)
    dim = dim_of(view.arg(1, "dim", 0), rank)
    if isinstance(at, Shard):
        if at.dim == dim:
            return None
        out: Placement = Shard(at.dim - (dim < at.dim), at.units, at.axis)
        return Decision({x: at}, (out,) * len(view.node.meta["type"]))
    return Decision({x: at}, (at,) * len(view.node.meta["type"]))


@rule(torch.cat, torch.stack)
def cat(view: View) -> Decision | None:
    """Along another dim than the cut one, when all can be cut alike."""
    parts = list(view.node.args[0])  # type: ignore[arg-type]
    rank = len(view.type(view.node).shape)
    dim = dim_of(view.arg(1, "dim", 0), rank)
    stacked = view.node.target is torch.stack
    first = next((view.at(n) for n in parts if isinstance(view.at(n), Shard)), None)
    if not isinstance(first, Shard):
        return Decision(dict.fromkeys(parts, REPLICATE), REPLICATE)
    if not stacked and first.dim == dim:
        return None
    if any(isinstance(at := view.at(n), Shard) and at != first for n in parts):
        return None
    out = first.dim + (stacked and dim <= first.dim)
    return Decision(dict.fromkeys(parts, first), Shard(out, first.units, first.axis))
