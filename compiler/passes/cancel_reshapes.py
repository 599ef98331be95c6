"""Reshapes that undo each other go."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compiler.ir import Block, tensor_type
from compiler.rewrite import calls_of, insert, is_call, replace_with


def cancel_reshapes(block: Block) -> Block:
    """Take a reshape of a reshape from the first input, and one to the same shape away.

        y = reshape(x, (-1, heads/tp, 64)); z = reshape(y, (-1, heads/tp*64))
    ->
        z = x
    """
    for node in calls_of(block, torch.reshape):
        x: Any = node.args[0]
        while is_call(x, torch.reshape) and -1 in _shape(node):
            x = x.args[0]
        if _same(x, node):
            replace_with(block, node, x)
        elif x is not node.args[0]:
            new = insert(block, node, torch.reshape, (x, _shape(node)))
            replace_with(block, node, new)
    return block


def _shape(node: fx.Node) -> tuple:
    shape: Any = node.args[1]
    return tuple(shape)


def _same(x: fx.Node, node: fx.Node) -> bool:
    return tensor_type(x) == tensor_type(node) and x.meta["placement"] == node.meta["placement"]
