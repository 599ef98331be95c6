"""Products with the parts of one tensor of the checkpoint -> one linear and a split."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from compiler import layers
from compiler.ir import Block, tensor_type
from compiler.passes.merge_products import merge_products
from compiler.recurrence import recurrence
from compiler.rewrite import calls_of, is_call
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
        names = [node.name for node in found]
        merge_products(block, found, kind="merged_column", name="merged", names=names)
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
