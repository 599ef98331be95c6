"""Of two tensors along a dim, which must be whole: cross products, integrals, distances."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from compiler.placement import REPLICATE, Placement, Shard
from compiler.rules.elementwise import elementwise
from compiler.rules.rule import Decision, Spelled, Steps, View, dim_of, rule


@rule(torch.cross, torch.linalg.cross)
def cross(view: View) -> Decision | None:
    """In each place but those of the dim, with broadcasting."""
    shape = view.type(view.node).shape
    default = -1
    if view.node.target is torch.cross:  # where none is given, the first of size 3
        default = next(i for i, n in enumerate(shape) if n == 3)
    dim = view.arg(2, "dim")
    found = elementwise(view)
    at = found and found.output
    if isinstance(at, Shard) and at.dim == dim_of(default if dim is None else dim, len(shape)):
        return None
    return found


@rule(torch.trapezoid, torch.cumulative_trapezoid)
def trapezoid(view: View) -> Decision | None:
    """The places of the samples are the same for all, or each row's own."""
    y, *places = view.tensors
    shape = view.type(y).shape
    dim = dim_of(view.node.kwargs.get("dim", -1), len(shape))  # type: ignore[arg-type]
    gone = len(view.type(view.node).shape) < len(shape)
    alike = [x for x in (y, *places) if view.type(x).shape == shape]
    at = next((p for p in map(view.whole, alike) if isinstance(p, Shard)), REPLICATE)
    lengths = all(x in alike or len(view.type(x).shape) == 1 for x in places)
    inputs: dict[fx.Node, Placement] = dict.fromkeys(view.tensors, REPLICATE)
    if not isinstance(at, Shard):
        return Decision(inputs, at)
    if at.dim == dim or not lengths:
        return None
    out = Shard(at.dim - (gone and dim < at.dim), at.units, at.axis)
    return Decision(inputs | dict.fromkeys(alike, at), out)


@rule(torch.pairwise_distance)
def pairwise_distance(view: View) -> Decision | None:
    """Over the last dim, of tensors of one shape."""
    shapes = [view.type(x).shape for x in view.tensors]
    at = next((p for p in map(view.whole, view.tensors) if isinstance(p, Shard)), REPLICATE)
    if isinstance(at, Shard) and (at.dim == len(shapes[0]) - 1 or len(set(shapes)) > 1):
        return None
    return Decision(dict.fromkeys(view.tensors, at), at)


@rule(torch.linalg.vecdot)
def vecdot(view: View) -> Spelled | None:
    """A product, and its sum: of real numbers."""
    x, y = view.node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(y, fx.Node)
    types = [view.type(n) for n in (x, y)]
    if types[0] != types[1] or types[0].dtype.is_complex:
        return None
    dim = dim_of(view.arg(2, "dim", -1), len(types[0].shape))

    def write(steps: Steps) -> fx.Node:
        product = steps("product", torch.mul, x, y)
        return steps("summed", torch.sum, product, dim, like=view.node)

    return Spelled(write)


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(view: View) -> Decision | None:
    """Of (*batch, seq, width) each: the batch dims, as heads, are apart from each other."""
    q, k, v = view.node.args[:3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    mask = view.arg(3, "attn_mask")
    batch = view.type(q).shape[:-2]
    inputs: dict[fx.Node, Placement] = dict.fromkeys(view.tensors, REPLICATE)
    at = next((p for p in map(view.whole, (q, k, v)) if isinstance(p, Shard)), REPLICATE)
    if not isinstance(at, Shard):
        return Decision(inputs, at)
    if at.dim >= len(batch) or any(view.type(n).shape[:-2] != batch for n in (k, v)):
        return None
    inputs |= dict.fromkeys((q, k, v), at)
    if isinstance(mask, fx.Node):
        shape = view.type(mask).shape
        dim = at.dim + len(shape) - len(batch) - 2
        if mask in (q, k, v):
            return None
        if dim >= 0 and shape[dim] != 1:
            inputs[mask] = Shard(dim, at.units, at.axis)
    return Decision(inputs, at)
