"""A linear and the addition of a bias -> a linear with a bias."""

from __future__ import annotations

import torch
from torch import fx

from compiler import layers
from compiler.ir import Block, tensor_type
from compiler.passes.parameter_view import uses_of
from compiler.placement import Shard
from compiler.rewrite import calls_of, is_call, is_param, only_user, replace_with


def fuse_bias(block: Block) -> Block:
    """Give a linear the parameter that is added to its result.

        y = linear(h, [p.q], []); q = reshape(y, (-1, heads/tp, 64)); q2 = q + p.q_bias
    ->
        y = linear(h, [p.q], [p.q_bias]); q2 = reshape(y, (-1, heads/tp, 64))

    A row-parallel layer adds its bias once, after the sum over ranks, as the graph does.
    """
    for node in calls_of(block, layers.linear):
        x, weights, biases = node.args
        shaped = _then(node, torch.reshape)
        added = only_user(shaped)
        if biases or node.kwargs["kind"] == "row_partial" or not is_call(added, torch.add):
            continue
        assert added is not None
        bias = next((a for a in added.args if a is not shaped), None)
        if not is_param(bias) or added.kwargs or not _fits(bias, shaped, node):  # type: ignore[arg-type]
            continue
        if uses_of(block, bias) != {added}:  # type: ignore[arg-type]
            continue  # a layer's parameters are read by that layer alone
        _move_before(block, bias, node)  # type: ignore[arg-type]
        node.args = (x, weights, (bias,))
        replace_with(block, added, shaped)
    return block


def _then(node: fx.Node, target: object) -> fx.Node:
    """The node's only user if it calls the target, else the node."""
    user = only_user(node)
    return user if user is not None and is_call(user, target) else node


def _fits(bias: fx.Node, shaped: fx.Node, linear: fx.Node) -> bool:
    """Whether a bias has exactly the dims that the linear makes, cut alike."""
    shape, out = tensor_type(bias).shape, tensor_type(shaped).shape
    if shape != out[len(out) - len(shape) :] or len(out) - len(shape) != 1:
        return False
    a, b = bias.meta["placement"], shaped.meta["placement"]
    if isinstance(a, Shard) != isinstance(b, Shard):
        return False
    return not isinstance(a, Shard) or (a.dim == b.dim - 1 and a.units == b.units)


def _move_before(block: Block, param: fx.Node, node: fx.Node) -> None:
    """Parameters have no operands: they can be read as early as anyone wants."""
    if param in _before(node):
        return
    node.prepend(param)


def _before(node: fx.Node) -> set[fx.Node]:
    seen = set()
    for other in node.graph.nodes:
        if other is node:
            return seen
        seen.add(other)
    return seen
