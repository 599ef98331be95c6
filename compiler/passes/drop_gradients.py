"""Serving takes no gradients: nodes that only shape them go, and those that do nothing forwards."""

from __future__ import annotations

import torch

from compiler import collectives
from compiler.ir import Block
from compiler.rewrite import calls_of, replace_with


def drop_gradients(block: Block) -> Block:
    """Remove `vary`, `replica_sum` and `detach`, which give their input back.

    So do the collectives of one block, of which every rank has a copy.

        h2 = vary(h, "tp"); q = einsum("...e,hde->...hd", h2, p.q)
    ->
        q = einsum("...e,hde->...hd", h, p.q)
    """
    for node in calls_of(block, collectives.vary, collectives.replica_sum, torch.detach):
        replace_with(block, node, node.args[0])  # type: ignore[arg-type]
    for node in calls_of(block, collectives.all_gather, collectives.take_block):
        if node.args[2] == 1:
            replace_with(block, node, node.args[0])  # type: ignore[arg-type]
    return block
