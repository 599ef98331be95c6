"""Operations a tracer sees as one node, whatever they compute inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
R = TypeVar("R")

ALL: dict[str, Callable] = {}  # name -> op, for whoever must give a rule for each of them


@overload
def primitive(fn: Callable[P, R]) -> Callable[P, R]: ...
@overload
def primitive(*, instead: Callable[P, Any]) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def primitive(fn: Callable[P, R] | None = None, *, instead: Callable[P, Any] | None = None) -> Any:
    """Make a function of tensors one node for a `TorchFunctionMode`, as torch's own functions are.

    While a mode is active, or an argument has its own `__torch_function__`, the call goes there
    first, with `func` the very object returned here: `func is ops.attention`. Otherwise, and
    under `torch.compile`, which records what is inside, it is a plain call.

    Args:
        fn: a pure function. Its tensors are arguments, not elements of containers; every other
            argument is a static Python value.
        instead: asked first, with the same arguments: what it returns, if not None, is the result.
    Returns:
        The function with the same signature, listed in `ALL` under its name.
    """
    if fn is None:
        return lambda fn: _primitive(fn, instead)
    return _primitive(fn, instead)


def _primitive(fn: Callable[P, R], instead: Callable[..., Any] | None) -> Callable[P, R]:
    @wraps(fn)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        if instead is not None:
            other = instead(*args, **kwargs)
            if other is not None:
                return other
        if not torch.compiler.is_compiling():
            values = (*args, *kwargs.values())
            if has_torch_function(values):
                return handle_torch_function(op, values, *args, **kwargs)
        return fn(*args, **kwargs)

    assert fn.__name__ not in ALL, f"two primitives named {fn.__name__}"
    ALL[fn.__name__] = op
    return op
