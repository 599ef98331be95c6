"""The cut at the unembedding: what makes hidden states, and what makes logits of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from compiler import layers
from compiler.ir import Block, Program, copy_node, target_name, tensor_type
from compiler.passes.parameter_view import view_of
from compiler.rewrite import is_param
from funcmodels import ops
from funcmodels.errors import LoweringError
from funcmodels.spec import POOLING_TASKS

# What can turn hidden states into logits.
_HEADS = (layers.logits, ops.unembed, layers.linear, F.linear, torch.matmul, torch.einsum)


@dataclass
class Split:
    """The root of a program in two: (tokens, positions) -> hidden states -> logits."""

    body: Block
    head: Block


def split_at_unembedding(program: Program) -> Split:
    """Cut the root where the last parameter matrix is applied.

        x = norm(x); logits = unembed(x, p.head); return 30 * tanh(logits / 30)
    ->
        forward: x = norm(x); return x        compute_logits: ..., from x alone

    The engine asks for the logits of few tokens only, and asks for them apart.

    A model that pools is not cut: its vectors are made of the whole result, of every token.

    Raises:
        LoweringError: the logits need more than one value that depends on the tokens.
    """
    root = program.root
    (result,) = root.results
    if program.model.task in POOLING_TASKS:
        nodes = [n for n in root.graph.nodes if n.op != "output"]
        body = _part(root, "forward", nodes, [], result)
        return Split(body, _part(root, "compute_logits", [], [result], result))
    unembedding = _last_product(result)
    hidden = next(n for n in unembedding.all_input_nodes if not is_param(n))
    before = _ancestors(hidden) | {hidden, *root.inputs}  # the engine gives positions in any case
    tail = [n for n in root.graph.nodes if n not in before and n.op != "output"]
    for node in tail:
        for used in node.all_input_nodes:
            if used in before and used is not hidden and not is_param(used):
                raise LoweringError(
                    f"{target_name(node.target)} after the unembedding reads a value from before",
                    got=f"the logits depend on {hidden.name} and on {used.name}",
                    need="logits that are a function of the last hidden states alone",
                    from_=node.meta["where"],
                    fix="do this before the unembedding, or leave it out",
                )
    body = _part(root, "forward", [n for n in root.graph.nodes if n in before], [], hidden)
    head = _part(root, "compute_logits", tail, [hidden], result)
    return Split(body, head)


def after_unembedding(program: Program) -> set[fx.Node]:
    """What of a traced program's root will be computed apart, with the logits."""
    root = program.root
    if program.model.task in POOLING_TASKS:
        return set()
    products = _products(root.results[0], lambda node: view_of(node) is not None)
    hidden = next((n for p in products for n in p.all_input_nodes if view_of(n) is None), None)
    if hidden is None:
        return set()
    before = _ancestors(hidden) | {hidden}
    return {n for n in root.graph.nodes if n not in before}


def _last_product(result: fx.Node) -> fx.Node:
    """The product with a parameter that is nearest to the result."""
    for node in _products(result, is_param):
        return node
    raise LoweringError(
        "forward has no unembedding",
        got="no product of hidden states and a parameter leads to the result",
        need="logits made from the last hidden states by one parameter",
        from_=result.meta["where"],
        fix="return ops.unembed(x, params['head'])",
    )


def _products(result: fx.Node, is_weight: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """Products with weights that lead to the result, the last one first."""
    order = {n: i for i, n in enumerate(result.graph.nodes)}
    for node in sorted(_ancestors(result) | {result}, key=order.__getitem__, reverse=True):
        applied = node.op == "call_function" and node.target in _HEADS
        if applied and any(map(is_weight, node.all_input_nodes)):
            yield node


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        for n in todo.pop().all_input_nodes:
            if n not in seen:
                seen.add(n)
                todo.append(n)
    return seen


def _part(
    root: Block, name: str, nodes: list[fx.Node], inputs: list[fx.Node], result: fx.Node
) -> Block:
    """A block of some of the root's nodes, with further inputs in front."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder("hidden_states")
        env[node].meta = {k: v for k, v in node.meta.items() if k != "binding"}  # no call any more
    for node in nodes:
        for used in node.all_input_nodes:  # a parameter that both parts read, as tied embeddings
            if used not in env and is_param(used):
                env[used] = copy_node(graph, used, env)
        if node not in env:
            env[node] = copy_node(graph, node, env)
    graph.output((env[result],))
    assert len(tensor_type(result).shape) == 2
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    used |= {outer for n in graph.nodes for outer in n.meta.get("binding", {}).values()}
    params = {k: v for k, v in root.params.items() if k in used}
    return Block(name, graph, params, function=root.function)
