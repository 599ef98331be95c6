"""Several column-parallel products of one input -> one of all their matrices, and a split."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from compiler import layers
from compiler.ir import Block, LocalSize, TensorType, tensor_type
from compiler.placement import Shard
from compiler.rewrite import insert, replace_with


def merge_products(
    block: Block, found: Sequence[fx.Node], *, kind: str, name: str, names: Sequence[str]
) -> None:
    """Put one linear and a split of its result in the place of several linears.

    Args:
        found: the linears, in the order of the merged one's matrices.
        kind: of the merged one.
        name: of it; `names` of the parts.
    """
    first = _params_before(block, found)
    tokens, dtype = tensor_type(first).shape[0], tensor_type(first).dtype
    widths: list[Any] = [tensor_type(n).shape[1] for n in found]
    at = [n.meta["placement"] for n in found]
    sizes = [
        LocalSize(a.units, width // a.units, a.axis, "tp")
        for a, width in zip(at, widths, strict=True)
    ]
    merged = insert(
        block,
        first,
        layers.linear,
        (first.args[0], _joined(n.args[1] for n in found), _joined(n.args[2] for n in found)),
        {"kind": kind, "matrices": _joined(n.kwargs["matrices"] for n in found)},
        type=TensorType(dtype, (tokens, sum(widths))),
        name=name,
    )
    placements = tuple(Shard(1, a.units, a.axis) for a in at)
    parts = insert(
        block,
        first,
        torch.split,
        (merged, sizes),
        {"dim": -1},
        type=tuple(tensor_type(n) for n in found),
        placement=placements,
        name=f"split_{name}",
    )
    new = [
        insert(
            block,
            first,
            operator.getitem,
            (parts, i),
            type=tensor_type(node),
            placement=placements[i],
            like=node,
            name=own,
        )
        for i, (node, own) in enumerate(zip(found, names, strict=True))
    ]
    for node, part in zip(found, new, strict=True):
        replace_with(block, node, part)


def _params_before(block: Block, found: Sequence[fx.Node]) -> fx.Node:
    """The first of the products, before which the parameters of all of them are read now."""
    order = {n: i for i, n in enumerate(block.graph.nodes)}
    first = min(found, key=order.__getitem__)
    for node in found:  # parameters can be read as early as anyone wants
        for param in (*node.args[1], *node.args[2]):  # type: ignore[misc]
            if order[param] > order[first]:
                first.prepend(param)
    return first


def _joined(tuples: Any) -> tuple:
    return tuple(each for one in tuples for each in one)
