"""The query, key and value projections of an attention -> one linear and a split."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from compiler import layers
from compiler.ir import Block, LocalSize, TensorType, tensor_type
from compiler.placement import Shard
from compiler.rewrite import calls_of, insert, is_call, replace_with
from compiler.rules import rms_norm_over_ranks
from compiler.rules.elementwise import is_elementwise
from funcmodels import ops


def fuse_qkv(block: Block) -> Block:
    """Merge the three column-parallel projections that end in one attention.

        q = linear(h, [p.q]); k = linear(h, [p.k]); v = linear(h, [p.v])
    ->
        qkv = linear(h, [p.q, p.k, p.v], kind="qkv")
        q, k, v = split(qkv, [heads/tp*64, kv_heads/tp*64, kv_heads/tp*64], dim=-1)

    This is also the layer that replicates KV heads where there are fewer than ranks.
    """
    for node in calls_of(block, ops.attention):
        found = [_projection(a) for a in node.args[:3]]
        if all(found) and _mergeable(found):  # type: ignore[arg-type]
            _merge(block, found)  # type: ignore[arg-type]
    return block


def _projection(value: Any) -> fx.Node | None:
    """The one linear that a value comes from, through rope, norms, reshapes, element-wise steps."""
    found: set[fx.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if is_call(node, layers.linear):
            found.add(node)
        elif is_call(node, operator.getitem) and is_call(node.args[0], ops.rope):
            todo.append(node.args[0].args[node.args[1]])
        elif is_call(node, torch.reshape, ops.rms_norm, ops.layer_norm, rms_norm_over_ranks):
            todo.append(node.args[0])
        elif isinstance(node, fx.Node) and is_elementwise(node.target):
            todo += node.all_input_nodes
    return found.pop() if len(found) == 1 else None


def _mergeable(found: list[fx.Node]) -> bool:
    """Whether the three are column-parallel linears of one input that the engine's layer covers."""
    q, k, v = found
    weights: list[Any] = [n.args[1] for n in found]
    matrices: list[Any] = [n.kwargs["matrices"] for n in found]
    if len({q, k, v}) < 3 or any(n.kwargs["kind"] != "column" for n in found):
        return False
    if any(n.args[0] is not q.args[0] for n in found) or len({bool(n.args[2]) for n in found}) > 1:
        return False
    units = [n.meta["placement"].units for n in found]
    widths = [_width(n) for n in found]
    return (
        units[1] == units[2]
        and widths[0] == widths[1]
        and all(
            matrix.out_dims[0] == weight.meta["placement"].dim
            for (matrix,), (weight,) in zip(matrices, weights, strict=True)
        )
    )


def _width(node: fx.Node) -> int:
    """Features of one head."""
    features = tensor_type(node).shape[1]
    assert isinstance(features, int)
    return features // node.meta["placement"].units


def _merge(block: Block, found: list[fx.Node]) -> None:
    order = {n: i for i, n in enumerate(block.graph.nodes)}
    first = min(found, key=order.__getitem__)
    for node in found:  # parameters can be read as early as anyone wants
        for param in (*node.args[1], *node.args[2]):  # type: ignore[misc]
            if order[param] > order[first]:
                first.prepend(param)
    tokens = tensor_type(first).shape[0]
    dtype = tensor_type(first).dtype
    features = [tensor_type(n).shape[1] for n in found]
    qkv = insert(
        block,
        first,
        layers.linear,
        (
            first.args[0],
            tuple(w for n in found for w in n.args[1]),  # type: ignore[union-attr]
            tuple(b for n in found for b in n.args[2]),  # type: ignore[union-attr]
        ),
        {"kind": "qkv", "matrices": tuple(m for n in found for m in n.kwargs["matrices"])},  # type: ignore[union-attr]
        type=TensorType(dtype, (tokens, sum(features))),  # type: ignore[arg-type]
        name="qkv",
    )
    at = [n.meta["placement"] for n in found]
    sizes = tuple(
        LocalSize(a.units, _width(n), a.axis, "tp") for a, n in zip(at, found, strict=True)
    )
    placements = tuple(Shard(1, a.units, a.axis) for a in at)
    parts = insert(
        block,
        first,
        torch.split,
        (qkv, list(sizes)),
        {"dim": -1},
        type=tuple(TensorType(dtype, (tokens, f)) for f in features),
        placement=placements,
        name="split_qkv",
    )
    for i, (node, name) in enumerate(zip(found, "qkv", strict=True)):
        part = insert(
            block,
            first,
            operator.getitem,
            (parts, i),
            type=tensor_type(node),
            placement=placements[i],
            like=node,
            name=name,
        )
        replace_with(block, node, part)
