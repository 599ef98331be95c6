"""A program as text, one aligned line a node: what the docs show, and tests compare.

attention:
  p.q                                             model[9, 64, 576]          shard(0, heads)
  %x = input                                      model[num_tokens, 576]     replicate
  %q = torch.einsum("...a,bca->...bc", %x, p.q)   model[num_tokens, 9, 64]   shard(1, heads)
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import fx

from compiler.ir import Block, LocalSize, Program, Sym, TensorType, binding, dtype_name, target_name
from compiler.layers import Matrix

_WIDTHS = (64, 40, 24)  # a longer cell pushes the rest of its line only


def format_program(program: Program, *, lines: bool = True) -> str:
    """Every block of a program, callees first.

    Args:
        program: at any stage.
        lines: whether to end each node with the user's line.
    """
    return "\n".join(format_block(block, lines=lines) for block in program.all())


def format_block(block: Block, *, lines: bool = True) -> str:
    """One block: its parameters, its inputs, a line for each operation, and what it returns."""
    order = {"get_attr": 0, "placeholder": 1}  # parameters and inputs first
    nodes = [node for node in block.graph.nodes if node.op != "output"]
    rows = [_row(node, lines) for node in sorted(nodes, key=lambda n: order.get(n.op, 2))]
    rows.append([f"return {', '.join(map(_argument, block.results))}"])
    widths = [
        min(most, max((len(row[i]) for row in rows if len(row) > i), default=0))
        for i, most in enumerate(_WIDTHS)
    ]
    text = ["   ".join(map(_padded, row, [*widths, 0])).rstrip() for row in rows]
    return "\n".join([f"{block.name}:", *(f"  {line}" for line in text)]) + "\n"


def _padded(cell: str, width: int) -> str:
    return f"{cell:<{width}}"


def _row(node: fx.Node, lines: bool) -> list[str]:
    type_, at = node.meta["type"], node.meta.get("placement")
    several = not isinstance(type_, TensorType)  # its parts follow, each on a line of its own
    where = node.meta["where"]
    line = f"# {os.path.basename(where.file)}:{where.line} in {where.function}" if lines else ""
    placed = "" if at is None or several else str(at)
    text = _argument(node) if node.op == "get_attr" else f"%{node.name} = {_value(node)}"
    return [text, "" if several else str(type_), placed, line]


def _value(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input, or none" if "optional" in node.meta else "input"
    if target_name(node.target) == "getitem":
        return f"{_argument(node.args[0])}[{_index(node.args[1])}]"
    arguments = [_argument(a) for a in node.args]
    arguments += [f"{name}={_argument(v)}" for name, v in node.kwargs.items()]
    if node.op == "call_module":
        return f"{node.target}({', '.join([*arguments, *_bound(binding(node))])})"
    return f"{target_name(node.target)}({', '.join(arguments)})"


def _bound(names: dict[str, str]) -> list[str]:
    """The parameters of a call: `p.layers.0` where the callee's are just those below it."""
    inner, outer = next(iter(names.items()), ("", ""))
    subtree = outer.removesuffix(f".{inner}")
    if names and all(theirs == f"{subtree}.{own}" for own, theirs in names.items()):
        return [f"p.{subtree}"]
    return [f"{own}=p.{theirs}" for own, theirs in sorted(names.items())]


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"p.{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, list):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_argument, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument(v)}" for k, v in value.items()) + "}"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, (Sym, LocalSize)):
        return str(value)
    if isinstance(value, Matrix):
        return f"{_dims(value.out_dims)}x{_dims(value.in_dims)}"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _dims(dims: tuple[int, ...]) -> str:
    return "(" + " ".join(map(str, dims)) + ")"


def _index(index: Any) -> str:
    if isinstance(index, tuple):
        return ", ".join(map(_index, index))
    if isinstance(index, slice):
        ends = ["" if end is None else _argument(end) for end in (index.start, index.stop)]
        return ":".join([*ends, *([] if index.step is None else [_argument(index.step)])])
    return "..." if index is Ellipsis else _argument(index)
