"""Why an operation is left to plain torch, in words for whoever wrote it."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import fx

from compiler.ir import TensorType, target_name
from compiler.passes.lower_linear import why_no_linear
from compiler.placement import Shard
from compiler.rewrite import is_call, is_param
from compiler.rules import vocab_embed
from compiler.views import VIEWS
from funcmodels import ops
from funcmodels.source import SourceLine

PRODUCTS = (torch.einsum, torch.matmul, F.linear, ops.unembed)


def fix_of_parts(node: fx.Node, axis: str) -> str | None:
    """What to declare instead where a node takes a cut dim apart: parts lie on other ranks."""
    index = node.args[1] if is_call(node, operator.getitem) else None
    sliced = any(isinstance(p, slice) for p in (index if isinstance(index, tuple) else (index,)))
    if not sliced and not is_call(node, torch.split, torch.chunk, torch.tensor_split, F.glu):
        return None
    return (
        f'declare the parts of "{axis}" as an axis of their own, P("two {axis} ...") and '
        ".unbind, or as a parameter each"
    )


def why_plain(node: fx.Node, gathered: Collection[SourceLine]) -> str:
    """Why a node of a lowered program is no layer of vLLM's.

    Args:
        gathered: the lines of operations without a rule for how their operands are cut.
    """
    if node.target in VIEWS:
        return "another view of the same elements"
    if node.target is torch.clone:
        return "the kernel after it overwrites its operand, which is read again later"
    if node.target in (ops.embed, vocab_embed):
        return "vLLM's embedding is of a table cut by rows: shard the vocabulary's axis"
    if node.target is ops.unembed:
        return "vLLM's output layer is of a table cut by rows: shard the vocabulary's axis"
    if node.target in PRODUCTS:
        return why_plain_product(node)
    if node.target in (ops.rms_norm, ops.layer_norm):
        return "its weight is computed, and a norm of vLLM's holds a parameter"
    if node.target in (F.rms_norm, F.layer_norm):
        return f"vLLM's layer is for ops.{target_name(node.target)[2:]}, with a weight and an eps"
    if node.meta["where"] in gathered:
        return "it has no sharding rule for a cut dim, so every rank does all of it"
    return "vLLM has no layer for it"


def why_plain_product(node: fx.Node) -> str:
    """Why a product is no linear layer."""
    params = [n for n in node.all_input_nodes if is_param(n)]
    if len(params) > 1:
        return "both factors are parameters: nothing here depends on the tokens"
    if not params:
        made = [n for n in node.all_input_nodes if from_parameters(n)]
        if made:
            return f"{made[0].name} is computed from parameters, and a linear layer holds its own"
        return "no factor is a parameter"
    found = why_no_linear(node)
    if found is not None:
        return found
    at = next((n.meta["placement"] for n in node.all_input_nodes if not is_param(n)), None)
    if isinstance(at, Shard):
        return f'its activation is cut along "{at.axis}", which the parameter does not have'
    return "vLLM has no layer for it"


def from_parameters(node: fx.Node) -> bool:
    """Whether a value is a parameter, or computed from parameters alone."""
    if is_param(node):
        return True
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(map(from_parameters, inputs))


def is_product(node: fx.Node) -> bool:
    """Whether a node is a product with a parameter that no layer does."""
    return is_call(node, *PRODUCTS) and any(map(from_parameters, node.all_input_nodes))


def is_view(node: fx.Node) -> bool:
    """Whether a node is free: a view, or a part of a tuple."""
    if not is_call(node, *VIEWS):
        return False
    if node.target is not operator.getitem:
        return True
    source, index = node.args
    assert isinstance(source, fx.Node)
    parts = index if isinstance(index, tuple) else (index,)
    whole = isinstance(source.meta["type"], TensorType)
    return not (whole and any(isinstance(part, fx.Node) for part in parts))
