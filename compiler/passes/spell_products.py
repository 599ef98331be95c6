"""Unembeddings of a model that pools -> products like others: it has no logits of a next token."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from compiler.ir import Program
from compiler.rewrite import calls_of, copy_block, insert, replace_with
from funcmodels import ops


def spell_products(program: Program) -> Program:
    """Write each unembedding of the root as a linear function.

        scores = unembed(x, p.score)
    ->
        scores = linear(x, p.score)

    The engine's layer for the first is for `compute_logits` alone. Runs on the traced program.
    """
    new = replace(program, root=copy_block(program.root))
    for node in calls_of(new.root, ops.unembed):
        replace_with(new.root, node, insert(new.root, node, F.linear, node.args))
    return new
