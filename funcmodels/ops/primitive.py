"""Operations a tracer sees as one node, whatever they compute inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
R = TypeVar("R")

ALL: dict[str, Callable] = {}  # name -> op, for whoever must give a rule for each of them


def primitive(fn: Callable[P, R]) -> Callable[P, R]:
    """Make a function of tensors one node for a `TorchFunctionMode`, as torch's own functions are.

    While a mode is active, or an argument has its own `__torch_function__`, the call goes there
    first, with `func` the very object returned here: `func is ops.attention`. Otherwise, and
    under `torch.compile`, which records what is inside, it is a plain call.

    Args:
        fn: a pure function. Its tensors are arguments, not elements of containers; every other
            argument is a static Python value.
    Returns:
        The function with the same signature, listed in `ALL` under its name.
    """

    @wraps(fn)
    def op(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            values = (*args, *kwargs.values())
            if has_torch_function(values):
                return handle_torch_function(op, values, *args, **kwargs)
        return fn(*args, **kwargs)

    assert fn.__name__ not in ALL, f"two primitives named {fn.__name__}"
    ALL[fn.__name__] = op
    return op
