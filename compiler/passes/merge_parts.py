"""Products with the parts of one tensor of the checkpoint -> one linear and a split."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from compiler import layers
from compiler.ir import Block, LocalSize, TensorType, tensor_type
from compiler.placement import Shard
from compiler.recurrence import recurrence
from compiler.rewrite import calls_of, insert, is_call, replace_with
from compiler.rules.elementwise import is_elementwise
from compiler.shared_tensors import place_in_tensor


def merge_parts(block: Block) -> Block:
    """Merge the column-parallel projections of one input whose matrices are parts of one tensor.

        z = linear(h, [p.z]); dt = linear(h, [p.dt]); x = linear(h, [p.x])    # in_proj: z, x, dt
    ->
        zxdt = linear(h, [p.z, p.x, p.dt], kind="merged_column")
        z, x, dt = split(zxdt, [heads/tp*64, heads/tp*64, heads/tp], dim=-1)

    Of other projections each is a module of its own in the checkpoint, which may be quantised or
    adapted alone. A part of a split has the strides of the whole: one that an engine's kernel would
    be given as it is, is not merged.
    """
    for found in list(_groups(block)):
        _merge(block, found)
    return block


def _groups(block: Block) -> Iterator[list[fx.Node]]:
    """Linears to be merged, as their parts lie in the tensor."""
    groups: dict[tuple, list[tuple[int, fx.Node]]] = {}
    for node in calls_of(block, layers.linear):
        x, weights, biases = node.args
        if node.kwargs["kind"] != "column" or not _takes_strides(node):
            continue
        param = block.params[str(weights[0].target)]  # type: ignore[index,union-attr]
        place = place_in_tensor(param)
        if place is not None:
            key = (x, place[0], param.dtype, tensor_type(node).dtype, bool(biases))
            groups.setdefault(key, []).append((place[1], node))
    for found in groups.values():
        if len(found) > 1:
            yield [node for _, node in sorted(found, key=lambda each: each[0])]


def _takes_strides(node: fx.Node) -> bool:
    """Whether all that reads a value takes any strides; a cast may change nothing."""
    for user in node.users:
        if is_call(user, torch.reshape, Tensor.to):
            if not _takes_strides(user):
                return False
        elif not (is_elementwise(user.target) or is_call(user, recurrence)):
            return False
    return True


def _merge(block: Block, found: list[fx.Node]) -> None:
    order = {n: i for i, n in enumerate(block.graph.nodes)}
    first = min(found, key=order.__getitem__)
    for node in found:  # parameters can be read as early as anyone wants
        for param in (*node.args[1], *node.args[2]):  # type: ignore[misc]
            if order[param] > order[first]:
                first.prepend(param)
    tokens, dtype = tensor_type(first).shape[0], tensor_type(first).dtype
    widths = [tensor_type(n).shape[1] for n in found]
    merged = insert(
        block,
        first,
        layers.linear,
        (
            first.args[0],
            tuple(w for n in found for w in n.args[1]),  # type: ignore[union-attr]
            tuple(b for n in found for b in n.args[2]),  # type: ignore[union-attr]
        ),
        {
            "kind": "merged_column",
            "matrices": tuple(m for n in found for m in n.kwargs["matrices"]),  # type: ignore[union-attr]
        },
        type=TensorType(dtype, (tokens, sum(widths))),  # type: ignore[arg-type]
        name="merged",
    )
    at = [n.meta["placement"] for n in found]
    sizes = [
        LocalSize(a.units, width // a.units, a.axis, "tp")  # type: ignore[operator]
        for a, width in zip(at, widths, strict=True)
    ]
    placements = tuple(Shard(1, a.units, a.axis) for a in at)
    parts = insert(
        block,
        first,
        torch.split,
        (merged, sizes),
        {"dim": -1},
        type=tuple(tensor_type(n) for n in found),
        placement=placements,
        name="split_merged",
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
            name=node.name,
        )
        for i, node in enumerate(found)
    ]
    for node, part in zip(found, new, strict=True):
        replace_with(block, node, part)
