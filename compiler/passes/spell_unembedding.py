"""The product that makes the logits -> `ops.unembed`, however it is written."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import fx

from compiler.ir import Program, tensor_type
from compiler.passes.lower_linear import Product, product_of
from compiler.rewrite import copy_block, insert, is_call, replace_with
from funcmodels import ops


def spell_unembedding(program: Program) -> Program:
    """Write the last product of the root with a (vocab, hidden) parameter as an unembedding.

        logits = matmul(x, transpose(p.embed))
    ->
        logits = unembed(x, p.embed)

    So a tied vocabulary is one in the served model, with the engine's layer for it. Runs on the
    traced program.
    """
    new = replace(program, root=copy_block(program.root))
    node = _last_product(new.root.results[0])
    product = product_of(node) if node is not None else None
    if node is None or not isinstance(product, Product) or product.bias is not None:
        return program
    lead = product.batch
    if product.x_letters[:-1] != lead or product.result[:-1] != lead:
        return program
    made, summed = product.result[-1], product.x_letters[-1]
    rows, columns = ([product.w_letters.index(c)] for c in (made, summed))
    table = product.w.param
    if len(tensor_type(table).shape) != 2 or product.w.whole_dims(rows) != (0,):
        return program
    if product.w.whole_dims(columns) != (1,):
        return program
    replace_with(new.root, node, insert(new.root, node, ops.unembed, (product.x, table)))
    for left in reversed(list(new.root.graph.nodes)):  # the views of the parameter
        if left.op == "call_function" and not left.users:
            new.root.graph.erase_node(left)
    return new


def _last_product(result: fx.Node) -> fx.Node | None:
    """The product that the logits are, before what is done to each of them."""
    node = result
    while True:
        if is_call(node, torch.einsum, torch.matmul, F.linear):
            return node
        inputs = [n for n in node.all_input_nodes if n.op == "call_function"]
        same = [n for n in inputs if n.meta["type"] == node.meta["type"]]
        if node.op != "call_function" or len(inputs) != 1 or not same:
            return None
        node = same[0]
