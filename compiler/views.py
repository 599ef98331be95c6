"""Functions whose results may be memory of an operand's, seen otherwise.

`tests/compiler/test_rules.py` runs every rule's rows, and fails for a function that is not here and
gave its operand's memory back.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from compiler import collectives
from compiler.rules import widened

VIEWS = frozenset({
    torch.reshape, torch.flatten, torch.unflatten, torch.transpose, torch.permute, torch.movedim,
    torch.unsqueeze, torch.squeeze, torch.split, torch.chunk, torch.tensor_split, torch.unbind,
    torch.select, torch.narrow, torch.diagonal, Tensor.unfold, Tensor.expand, torch.detach,
    torch.real, torch.imag, torch.conj, torch.resolve_conj, torch.positive, torch.view_as_complex,
    torch.view_as_real, Tensor.view, operator.getitem, collectives.take_block,
})  # fmt: skip
# Some give their operand itself where there is nothing to do.
_PERHAPS = frozenset({Tensor.to, widened, *collectives.ALL})


def may_share_memory(node: fx.Node) -> bool:
    """Whether a node's result may be memory of an operand's."""
    if node.target is torch.einsum:  # of one tensor, it moves dims
        return len(node.all_input_nodes) == 1
    return node.target in VIEWS or node.target in _PERHAPS
