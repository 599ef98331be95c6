"""What a block reads beside its arguments: Python values that may differ from call to call.

A block is recorded once and called many times. That is right only while the numbers and flags it
sees are the same, so they are part of what tells two recordings apart.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from torch import Tensor

_BY_IDENTITY = (Tensor, FunctionType, BuiltinFunctionType, ModuleType, type)
_DEPTH = 4  # of containers in containers


def surroundings(fn: Callable[..., Any]) -> tuple[Any, ...]:
    """The values of a function's free and global variables, as they are now."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if not isinstance(fn, FunctionType):
        return ()
    cells = tuple(_cell(cell) for cell in fn.__closure__ or ())
    return (*cells, *(_outer(fn.__globals__[name]) for name in _globals(fn)))


@functools.lru_cache(maxsize=1024)
def _globals(fn: FunctionType) -> tuple[str, ...]:
    """The global variables that a function names."""
    return tuple(name for name in fn.__code__.co_names if name in fn.__globals__)


def _cell(cell: Any) -> Any:
    try:
        return _outer(cell.cell_contents)
    except ValueError:  # not assigned yet
        return None


def _outer(value: Any) -> Any:
    """A snapshot of a variable; of one that cannot be compared, which object it is."""
    if isinstance(value, _BY_IDENTITY):
        return id(value)
    try:
        hash(found := snapshot(value))
    except TypeError:
        return id(value)
    return found


def snapshot(value: Any, depth: int = _DEPTH) -> Any:
    """A static value as something that is equal only to what a function cannot tell from it.

    May be unhashable, where the value is.
    """
    if depth and isinstance(value, (list, tuple)):
        return (type(value), tuple(snapshot(v, depth - 1) for v in value))
    if depth and isinstance(value, dict):
        return (dict, tuple((snapshot(k, 0), snapshot(v, depth - 1)) for k, v in value.items()))
    if isinstance(value, slice):
        return (slice, value.start, value.stop, value.step)
    if depth and _is_mutable(value):
        return (id(value), snapshot(vars(value), depth - 1))
    return (type(value), value)


def _is_mutable(value: Any) -> bool:
    """Whether a value is an object that is compared by identity, but may change what it holds."""
    kind = type(value)
    return (
        kind.__hash__ is object.__hash__
        and hasattr(value, "__dict__")
        and not isinstance(value, _BY_IDENTITY)
        and not inspect.isroutine(value)
    )
