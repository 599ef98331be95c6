"""The two projections of a gated unit -> one merged linear and one activation."""

from __future__ import annotations

from torch import fx

from compiler import layers
from compiler.ir import Block, TensorType, tensor_type
from compiler.rewrite import calls_of, insert, is_call, only_user, replace_with
from funcmodels import ops


def fuse_gate_up(block: Block) -> Block:
    """Merge the column-parallel projections that feed a gated unit.

        a = linear(h, [p.gate]); b = linear(h, [p.up]); y = swiglu(a, b)
    ->
        ab = linear(h, [p.gate, p.up], kind="merged_column"); y = silu_and_mul(ab)
    """
    for node in calls_of(block, ops.swiglu, ops.geglu):
        gate, up = node.args
        if isinstance(gate, fx.Node) and isinstance(up, fx.Node) and _mergeable(gate, up, node):
            _merge(block, node, gate, up)
    return block


def _mergeable(gate: fx.Node, up: fx.Node, node: fx.Node) -> bool:
    """Whether both are column-parallel linears of one input, alike and for this node alone."""
    return (
        all(is_call(n, layers.linear) and n.kwargs["kind"] == "column" for n in (gate, up))
        and all(only_user(n) is node for n in (gate, up))
        and gate.args[0] is up.args[0]
        and tensor_type(gate) == tensor_type(up)
        and bool(gate.args[2]) == bool(up.args[2])
        and bool(gate.kwargs["matrices"] == up.kwargs["matrices"])
    )


def _merge(block: Block, node: fx.Node, gate: fx.Node, up: fx.Node) -> None:
    tokens, features = tensor_type(gate).shape
    kind = TensorType(tensor_type(gate).dtype, (tokens, features * 2))  # type: ignore[operator]
    both = insert(
        block,
        node,
        layers.linear,
        (gate.args[0], (*gate.args[1], *up.args[1]), (*gate.args[2], *up.args[2])),  # type: ignore[misc]
        {"kind": "merged_column", "matrices": (*gate.kwargs["matrices"], *up.kwargs["matrices"])},  # type: ignore[misc]
        type=kind,
        like=gate,
        name="gate_up",
    )
    if node.target is ops.swiglu:
        new = insert(block, node, layers.silu_and_mul, (both,), name="gated")
    else:
        new = insert(block, node, layers.gelu_and_mul, (both,), dict(node.kwargs), name="gated")
    replace_with(block, node, new)
    for old in (gate, up):
        block.graph.erase_node(old)
