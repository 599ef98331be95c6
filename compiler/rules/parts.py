"""Taking tensors apart and putting them together."""

from __future__ import annotations

import operator

import torch
from torch import fx

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
    if not isinstance(at, Shard):
        if any(isinstance(p, (fx.Node, list)) for p in parts):
            return None
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


@rule(torch.split, torch.chunk)
def split(view: View) -> Decision | None:
    """Along another dim than the cut one."""
    x = view.tensors[0]
    at, rank = view.at(x), len(view.type(x).shape)
    if isinstance(at, Shard) and at.dim == dim_of(view.arg(2, "dim", 0), rank):
        return None
    return Decision({x: at}, (at,) * len(view.node.meta["type"]))


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
