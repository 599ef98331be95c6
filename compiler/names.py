"""Names that a reader of the printed graph and of the emitted source knows: the user's own."""

from __future__ import annotations

import ast
import functools
import inspect
import keyword
import linecache
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

from funcmodels.tree import path_of

if TYPE_CHECKING:
    from compiler.ir import Block


def argument_names(fn: Callable[..., Any], args: tuple, kwargs: dict) -> list[str]:
    """A unique name for each leaf of a call's arguments, in order.

    Leaves of the first argument, the block's own parameters, are named by their path in it; those
    of others by the argument's name and their path.
    """
    parameters = list(inspect.signature(fn).parameters.values())
    names: list[str] = []
    taken: set[str] = set()
    for i, value in enumerate(args):
        variadic = i >= len(parameters) or parameters[i].kind is inspect.Parameter.VAR_POSITIONAL
        names += _leaf_names(f"arg{i}" if variadic else parameters[i].name, value, i == 0, taken)
    for name, value in kwargs.items():
        names += _leaf_names(name, value, False, taken)
    return names


def _leaf_names(argument: str, value: Any, is_first: bool, taken: set[str]) -> list[str]:
    names = []
    for keys, _ in pytree.tree_flatten_with_path(value)[0]:
        parts = (
            [path_of(keys)] if is_first and keys else [argument, *([path_of(keys)] if keys else [])]
        )
        names.append(unique(".".join(parts), taken))
        taken.add(names[-1])
    return names


def unique(name: str, taken: Iterable[str]) -> str:
    """The name, or the name with a number."""
    taken = set(taken)
    if name not in taken:
        return name
    return next(f"{name}_{i}" for i in range(2, len(taken) + 3) if f"{name}_{i}" not in taken)


def name_by_users_variables(block: Block) -> None:
    """Name the last node of each of the user's assignments by the variable it is assigned to."""
    last: dict[tuple[str, int], list[Any]] = {}
    for node in block.graph.nodes:
        if node.op in ("call_function", "call_module"):
            where = node.meta["where"]
            start, targets = _assignment(where.file, where.line)
            if targets:
                last.setdefault((where.file, start, targets), []).append(node)  # type: ignore[arg-type]
    for (_, _, targets), nodes in last.items():  # type: ignore[misc]
        for name, node in zip(reversed(targets), reversed(nodes), strict=False):
            if len(targets) > 1 and len(nodes) < len(targets):
                break
            node._rename(name)


@functools.lru_cache(maxsize=512)
def _assignments(file: str) -> dict[int, tuple[int, tuple[str, ...]]]:
    """Line -> (first line, target names) of every assignment of plain names in a file."""
    try:
        parsed = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return {}
    found: dict[int, tuple[int, tuple[str, ...]]] = {}
    for statement in ast.walk(parsed):
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            continue
        target = statement.targets[0]
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        if all(isinstance(name, ast.Name) for name in names):
            ids = tuple(name.id for name in names if isinstance(name, ast.Name))
            for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
                found[line] = (statement.lineno, ids)
    return found


def _assignment(file: str, line: int) -> tuple[int, tuple[str, ...]]:
    return _assignments(file).get(line, (line, ()))


def identifier(text: str) -> str:
    """Any text as a Python identifier."""
    name = re.sub(r"\W+", "_", text).strip("_") or "value"
    return f"_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name


def class_name(name: str) -> str:
    """`decoder_layer` as `DecoderLayer`."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_") if part)
