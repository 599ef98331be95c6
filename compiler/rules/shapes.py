"""Reshapes, permutations and other ways to see the same elements."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from compiler.ir import LocalSize, Sym
from compiler.placement import Shard
from compiler.rules.rule import Decision, Exactly, View, by_tokens, dim_of, rule


@rule(torch.reshape, torch.flatten, torch.unflatten)
def reshape(view: View) -> Decision | None:
    """Dims are merged and split in groups; a cut dim must lead its group."""
    x = view.tensors[0]
    before, after = view.type(x).shape, view.type(view.node).shape
    at = view.at(x)
    if not isinstance(at, Shard):
        return Decision({x: at}, at, args=(x, _kept(view, after)), kwargs={}, target=torch.reshape)
    for old, new in shape_groups(before, after):
        if at.dim not in old:
            continue
        if any(before[d] != 1 for d in old if d < at.dim):
            return None
        # One block is as good along any dim, and of one head best along the heads'.
        target = next((d for d in new if after[d] != 1 or at.units == 1), None)
        if target is None:
            return None
        size = after[target]
        if isinstance(size, Sym):
            units = at.units
            if sum(before[d] != 1 for d in old) > 1 or sum(after[d] != 1 for d in new) > 1:
                return None
        else:
            units = math.gcd(at.units, size)
        if units == 1 < at.units:
            return None
        needs = [] if units == at.units else [Exactly(units, at.axis, f"it is split into {size}")]
        out = Shard(target, units, at.axis)
        return Decision({x: at}, out, (x, _kept(view, after, out)), {}, torch.reshape, needs)
    return None


def _kept(view: View, shape: tuple, shard: Shard | None = None) -> tuple:
    """The sizes of the local result: -1 where the node has one, a rank's share where it is cut."""
    given = view.arg(1, "shape") if view.node.target is torch.reshape else None
    sizes = list(given) if isinstance(given, (tuple, list)) else _one_inferred(shape)
    if shard is not None and sizes[shard.dim] != -1 and not isinstance(sizes[shard.dim], Sym):
        sizes[shard.dim] = LocalSize(
            shard.units, sizes[shard.dim] // shard.units, shard.axis, view.axis
        )
    return tuple(sizes)


def _one_inferred(shape: tuple) -> list:
    """A shape whose only symbolic size is left to torch."""
    if sum(isinstance(n, Sym) for n in shape) == 1:
        return [-1 if isinstance(n, Sym) else n for n in shape]
    return list(shape)


def shape_groups(before: tuple, after: tuple) -> list[tuple[list[int], list[int]]]:
    """Dims of two shapes of one size, in the smallest groups of equal products."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [], []
        a: Any = 1
        b: Any = 1
        if i < len(before):
            a, old, i = before[i], [i], i + 1
        if j < len(after):
            b, new, j = after[j], [j], j + 1
        while a != b:
            if a == 1 and i < len(before):
                a, old, i = before[i], [*old, i], i + 1
            elif b == 1 and j < len(after):
                b, new, j = after[j], [*new, j], j + 1
            elif isinstance(a, Sym) or isinstance(b, Sym) or a == -1 or b == -1:
                old, new = [*old, *range(i, len(before))], [*new, *range(j, len(after))]
                i, j = len(before), len(after)
                break
            elif a < b and i < len(before):
                a, old, i = _times(a, before[i]), [*old, i], i + 1
            elif b < a and j < len(after):
                b, new, j = _times(b, after[j]), [*new, j], j + 1
            else:
                break
        groups.append((old, new))
    return groups


def _times(a: Any, b: Any) -> Any:
    """A product that stays symbolic, and so unequal, where a factor is."""
    return Sym(f"({a})*({b})") if isinstance(a, Sym) or isinstance(b, Sym) else a * b


def _moved(view: View, order: list[int]) -> Decision:
    """A permutation of dims: output dim i is input dim order[i]."""
    x = view.tensors[0]
    at = view.at(x)
    out = Shard(order.index(at.dim), at.units, at.axis) if isinstance(at, Shard) else at
    return Decision({x: at}, out)


@rule(torch.transpose, torch.permute, torch.movedim)
def permute(view: View) -> Decision | None:
    return _moved(view, order_of(view.node))


def order_of(node: fx.Node) -> list[int]:
    """Of a transpose, permute or movedim: which dim of the input each dim of the output is."""
    view, rank = View(node, {}, ""), len(node.meta["type"].shape)
    if node.target is torch.permute:
        return [dim_of(d, rank) for d in view.arg(1, "dims")]
    if node.target is torch.transpose:
        a, b = dim_of(view.arg(1, "dim0"), rank), dim_of(view.arg(2, "dim1"), rank)
        order = list(range(rank))
        order[a], order[b] = order[b], order[a]
        return order
    source, to = view.arg(1, "source"), view.arg(2, "destination")
    pairs = zip(*(([d] if isinstance(d, int) else list(d)) for d in (source, to)), strict=True)
    moved = sorted((dim_of(t, rank), dim_of(s, rank)) for s, t in pairs)
    order = [d for d in range(rank) if d not in {s for _, s in moved}]
    for to_dim, from_dim in moved:
        order.insert(to_dim, from_dim)
    return order


@rule(torch.unsqueeze)
def unsqueeze(view: View) -> Decision | None:
    dim = dim_of(view.arg(1, "dim"), len(view.type(view.node).shape))
    x = view.tensors[0]
    at = view.at(x)
    out = Shard(at.dim + (dim <= at.dim), at.units, at.axis) if isinstance(at, Shard) else at
    return Decision({x: at}, out)


@rule(torch.squeeze)
def squeeze(view: View) -> Decision | None:
    x = view.tensors[0]
    at, shape = view.at(x), view.type(x).shape
    dim = view.arg(1, "dim")
    dims = range(len(shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    named = {dim_of(d, len(shape)) for d in dims}
    gone = [d for d, n in enumerate(shape) if n == 1 and d in named]
    if isinstance(at, Shard) and at.dim not in gone:
        at = Shard(at.dim - sum(d < at.dim for d in gone), at.units, at.axis)
        # Without a dim, a local block of size 1 would be squeezed away with the others.
        if dim is None:
            return None
    return Decision({x: view.at(x)}, at)


@rule(Tensor.expand)
def expand(view: View) -> Decision | None:
    x = view.tensors[0]  # a pending sum is taken first, of the fewer elements
    at, sizes = view.whole(x), list(view.arg(1, "size"))
    if not isinstance(at, Shard):
        return Decision({x: at}, by_tokens(view) or at)
    dim = at.dim + len(sizes) - len(view.type(x).shape)
    if sizes[dim] == view.type(x).shape[at.dim]:
        sizes[dim] = -1
    return Decision({x: at}, Shard(dim, at.units, at.axis), args=(x, tuple(sizes)))
