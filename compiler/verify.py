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
    takes = {name: _Callee(block) for name, block in program.blocks.items()}
    for block in program.all():
        if id(block) not in checked:
            block.graph.lint()
            for node in block.graph.nodes:
                _check_node(takes, block, node, known, placed)
            if not block.results:
                raise VerifyError(f"block {block.name} returns nothing")
        known.add(block.name)


class _Callee:
    """What calls of a block are checked against, found once for all of them."""

    def __init__(self, block: Block) -> None:
        self.name = block.name
        self.inputs = [(node.name, node.meta["type"]) for node in block.inputs]
        self.results = tuple(result.meta["type"] for result in block.results)
        self.shapes = {name: param.shape for name, param in block.params.items()}


def _check_node(
    callees: dict[str, _Callee], block: Block, node: fx.Node, known: set[str], placed: bool
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
        _check_call(callees, block, node, fail)
        if str(node.target) not in known:
            raise fail(f"{node.target} is called before it is defined")


def _check_call(
    callees: dict[str, _Callee], block: Block, node: fx.Node, fail: Callable[[str], VerifyError]
) -> None:
    callee = callees.get(str(node.target))
    if callee is None:
        raise fail(f"calls {node.target}, which is no block")
    if len(node.args) != len(callee.inputs):
        raise fail(f"gives {len(node.args)} arguments to {callee.name}({len(callee.inputs)})")
    for arg, (name, want) in zip(node.args, callee.inputs, strict=True):
        if isinstance(arg, fx.Node) and arg.meta["type"] != want:
            raise fail(f"gives {arg.meta['type']} to {name}, which is {want}")
    found = callee.results
    if node.meta["type"] not in (found, found[0] if len(found) == 1 else found):
        raise fail(f"is {node.meta['type']}, but {callee.name} returns {found}")
    bound = node.meta["binding"]
    if bound.keys() != callee.shapes.keys():
        raise fail(f"binds {sorted(bound)}, but {callee.name} has {sorted(callee.shapes)}")
    for inner, outer in bound.items():
        if outer not in block.params:
            raise fail(f"binds {inner} to {outer}, which is no parameter here")
        if block.params[outer].shape != callee.shapes[inner]:
            raise fail(f"binds {inner} to {outer} of another shape")
