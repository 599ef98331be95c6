"""The root of a program as parts in a row: each call of a block, and what stands between them.

A part is what fully sharded parameters are gathered for, and where pipeline stages may be cut.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from compiler.ir import Block, Program, binding
from compiler.rewrite import is_call


@dataclass(eq=False)
class Part:
    """One part of a program's root.

    Args:
        block: what it does.
        inputs: the root's values that it takes, in the order of the block's inputs.
        results: the root's values that it makes, in the order of the block's results; None for
            one that nothing reads.
        params: the paths of its parameters, by their names in the block.
        is_call: whether it is a call of a block of the user's.
    """

    block: Block
    inputs: list[fx.Node]
    results: list[fx.Node | None]
    params: dict[str, str]
    is_call: bool


def parts_of(program: Program) -> list[Part]:
    """A program's root, cut at its calls."""
    parts: list[Part] = []
    run: list[fx.Node] = []
    for node in program.root.graph.nodes:
        if node.op == "call_module":
            parts += _between(program, run)
            parts.append(_call(program, node))
            run = []
        elif node.op == "call_function" and not _taken_out(node):
            run.append(node)
    return [*parts, *_between(program, run)]


def _taken_out(node: fx.Node) -> bool:
    """Whether a node is one of several results of a call."""
    return is_call(node, operator.getitem) and node.args[0].op == "call_module"  # type: ignore[union-attr]


def _call(program: Program, node: fx.Node) -> Part:
    callee = program.blocks[str(node.target)]
    results: list[fx.Node | None] = [node]
    if isinstance(node.meta["type"], tuple):
        taken = {user.args[1]: user for user in node.users}
        results = [taken.get(i) for i in range(len(callee.results))]
    inputs = [a for a in node.args if isinstance(a, fx.Node)]
    assert len(inputs) == len(callee.inputs), "a block's inputs are tensors"
    return Part(callee, inputs, results, dict(binding(node)), True)


def _between(program: Program, run: list[fx.Node]) -> list[Part]:
    """The nodes between two calls as a part; none where there are none."""
    own = set(run)
    results = [node for node in run if set(node.users) - own]
    if not results:
        return []
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []
    params: dict[str, str] = {}
    for node in run:
        for used in node.all_input_nodes:
            if used in env:
                continue
            if used.op == "get_attr":
                env[used] = graph.node_copy(used)
                params[str(used.target)] = str(used.target)
            elif used not in own:
                env[used] = graph.placeholder(used.name)
                env[used].meta = {k: v for k, v in used.meta.items() if k != "binding"}
                inputs.append(used)
        env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[node] for node in results))
    root = program.root
    declared = {path: root.params[path] for path in params}
    block = Block(f"{root.name}_{run[0].name}", graph, declared, function=root.function)
    return [Part(block, inputs, list(results), params, False)]
