"""What a program must obey at every stage; a breach is a bug of the compiler, named as such."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from compiler.ir import Block, Program, TensorType
from funcmodels.errors import VerifyError

_OPS = {"placeholder", "get_attr", "call_function", "call_module", "output"}


def verify(program: Program, *, since: Program | None = None) -> None:
    """Check every block: operations, types, lines, parameters and the calls between blocks.

    Args:
        program: what to check.
        since: a program that was checked; the blocks that both share are passed over.
    Raises:
        VerifyError: names the block, the node and the rule.
    """
    checked = set(map(id, since.all())) if since is not None else set()
    placed = any("placement" in node.meta for node in program.root.inputs)
    known: set[str] = set()
    for block in program.all():
        if id(block) not in checked:
            block.graph.lint()
            for node in block.graph.nodes:
                _check_node(program, block, node, known, placed)
            if not block.results:
                raise VerifyError(f"block {block.name} returns nothing")
        known.add(block.name)


def _check_node(
    program: Program, block: Block, node: fx.Node, known: set[str], placed: bool
) -> None:
    def fail(rule: str) -> VerifyError:
        return VerifyError(f"{block.name}.{node.name}: {rule}", from_=node.meta.get("where"))

    if node.op not in _OPS:
        raise fail(f"{node.op} is no operation of this representation")
    if node.op == "output":
        return
    if "type" not in node.meta or "where" not in node.meta:
        raise fail("a node has no type or no source line")
    if placed and "placement" not in node.meta:
        raise fail("a node of a partitioned program has no placement")
    types = node.meta["type"]
    for type_ in types if isinstance(types, (tuple, list)) else (types,):
        if not isinstance(type_, TensorType) or not isinstance(type_.dtype, torch.dtype):
            raise fail(f"{type_!r} is no tensor type")
    if node.op == "get_attr" and node.target not in block.params:
        raise fail(f"{node.target} is no parameter of the block")
    if node.op == "call_function" and not callable(node.target):
        raise fail(f"{node.target!r} is no function")
    if node.op == "call_module":
        _check_call(program, block, node, fail)
        if str(node.target) not in known:
            raise fail(f"{node.target} is called before it is defined")


def _check_call(
    program: Program, block: Block, node: fx.Node, fail: Callable[[str], VerifyError]
) -> None:
    callee = program.blocks.get(str(node.target))
    if callee is None:
        raise fail(f"calls {node.target}, which is no block")
    if len(node.args) != len(callee.inputs):
        raise fail(f"gives {len(node.args)} arguments to {callee.name}({len(callee.inputs)})")
    for arg, placeholder in zip(node.args, callee.inputs, strict=True):
        want = placeholder.meta["type"]
        if isinstance(arg, fx.Node) and arg.meta["type"] != want:
            raise fail(f"gives {arg.meta['type']} to {placeholder.name}, which is {want}")
    found = tuple(result.meta["type"] for result in callee.results)
    if node.meta["type"] not in (found, found[0] if len(found) == 1 else found):
        raise fail(f"is {node.meta['type']}, but {callee.name} returns {found}")
    bound = node.meta["binding"]
    if set(bound) != set(callee.params):
        raise fail(f"binds {sorted(bound)}, but {callee.name} has {sorted(callee.params)}")
    for inner, outer in bound.items():
        if outer not in block.params:
            raise fail(f"binds {inner} to {outer}, which is no parameter here")
        if block.params[outer].shape != callee.params[inner].shape:
            raise fail(f"binds {inner} to {outer} of another shape")
