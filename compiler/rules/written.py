"""A part of a tensor in the place of another, or added to it: along other dims than the cut one."""

from __future__ import annotations

import torch
from torch import fx

from compiler.placement import REPLICATE, Placement, Shard
from compiler.rules.rule import Decision, View, dim_of, rule


@rule(torch.select_scatter, torch.slice_scatter)
def part(view: View) -> Decision | None:
    """An element or a stretch of a dim, given by a tensor that lacks the dim, or has less of it."""
    x, source = view.node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(source, fx.Node)
    dim = dim_of(view.arg(2, "dim", 0), len(view.type(x).shape))
    gone = view.node.target is torch.select_scatter
    at = view.whole(x)
    if not isinstance(at, Shard) and isinstance(of := view.whole(source), Shard):
        at = Shard(of.dim + (gone and dim <= of.dim), of.units, of.axis)
    if not isinstance(at, Shard):
        return Decision({x: at, source: at}, at)
    if at.dim == dim or x is source:
        return None
    of = Shard(at.dim - (gone and dim < at.dim), at.units, at.axis)
    return Decision({x: at, source: of}, at)


@rule(torch.index_add, torch.index_copy, torch.index_reduce, torch.index_fill)
def by_numbers(view: View) -> Decision | None:
    """Elements of a dim by their numbers, which every rank has."""
    x, dim, _, source = view.node.args[:4]
    assert isinstance(x, fx.Node) and isinstance(dim, int)
    given = [x]
    if isinstance(source, fx.Node) and view.node.target is not torch.index_fill:
        given.append(source)
    at = next((p for p in map(view.whole, given) if isinstance(p, Shard)), REPLICATE)
    if isinstance(at, Shard) and at.dim == dim_of(dim, len(view.type(x).shape)):
        return None
    inputs: dict[fx.Node, Placement] = dict.fromkeys(view.tensors, REPLICATE)
    return Decision(inputs | dict.fromkeys(given, at), at)
