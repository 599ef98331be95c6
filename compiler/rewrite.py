"""What passes are written with: copies of blocks, and small questions about nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from compiler.ir import Block, Program, TensorType, add_node, copy_node

BlockPass = Callable[[Block], Block]
ProgramPass = Callable[[Program], Program]


def copy_block(block: Block) -> Block:
    """A block with a graph of its own."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in block.graph.nodes:
        env[node] = copy_node(graph, node, env)
    return replace(block, graph=graph, params=dict(block.params))


def on_blocks(fn: BlockPass, *targets: Any) -> ProgramPass:
    """A pass over a program that does the same to each of its blocks, and drops what that kills.

    Args:
        fn: changes a block of its own and returns it.
        targets: what it looks for; a block that calls none of them is left as it is, uncopied.
    """

    def one(block: Block) -> Block:
        return dce(fn(copy_block(block))) if calls_of(block, *targets) else block

    def run(program: Program) -> Program:
        blocks = {name: one(block) for name, block in program.blocks.items()}
        return replace(program, root=one(program.root), blocks=blocks)

    run.__name__, run.__doc__ = fn.__name__, fn.__doc__
    return run


def calls_of(block: Block, *targets: Any) -> list[fx.Node]:
    """The nodes that call one of the functions."""
    return [n for n in block.graph.nodes if n.op == "call_function" and n.target in targets]


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_param(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses a value, or None where there are none or several."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def insert(
    block: Block,
    before: fx.Node,
    target: Any,
    args: tuple,
    kwargs: dict | None = None,
    *,
    type: TensorType | tuple | None = None,
    placement: Any = None,
    like: fx.Node | None = None,
    name: str | None = None,
) -> fx.Node:
    """A new node before another, with the line, type and placement of `like` where not given."""
    like = like or before
    with block.graph.inserting_before(before):
        node = add_node(block.graph, "call_function", target, args, kwargs or {}, name)
    node.meta = dict(like.meta)
    if type is not None:
        node.meta["type"] = type
    if placement is not None:
        node.meta["placement"] = placement
    return node


def replace_with(block: Block, old: fx.Node, new: fx.Node) -> None:
    """Let `new` be used wherever `old` was, and drop `old`."""
    old.replace_all_uses_with(new)
    block.graph.erase_node(old)


def dce(block: Block) -> Block:
    """Drop what nothing uses: every operation of a graph is pure."""
    for node in reversed(block.graph.nodes):
        if node.op not in ("placeholder", "output") and not node.users:
            block.graph.erase_node(node)
    return block
