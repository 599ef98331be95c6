"""Casts to the dtype that a value has go."""

from __future__ import annotations

from torch import Tensor

from compiler.ir import Block, tensor_type
from compiler.rewrite import calls_of, replace_with


def cancel_casts(block: Block) -> Block:
    """Take a cast that changes nothing away.

        y = to(x, float32); z = to(y, float32)
    ->
        z = to(x, float32)
    """
    for node in calls_of(block, Tensor.to):
        x = node.all_input_nodes[0]
        if node.args == (x, tensor_type(x).dtype) and not node.kwargs:
            replace_with(block, node, x)
    return block
