"""The query, key and value projections of an attention -> one linear and a split."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from compiler import layers
from compiler.ir import Block, tensor_type
from compiler.passes.merge_products import merge_products
from compiler.rewrite import calls_of, is_call
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
            merge_products(block, found, kind="qkv", name="qkv", names="qkv")  # type: ignore[arg-type]
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
