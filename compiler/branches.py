"""Branches of the user's Python on symbolic sizes, each seen where it is taken.

torch notes a guard for a branch, but only for one that nothing before has decided: where an
operation has already asked whether there is one token, the user's own question leaves no trace.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from funcmodels.source import is_users


@contextmanager
def seen(branch: Callable[[Any], None]) -> Iterator[None]:
    """Call `branch` with the expression that the user's Python takes the truth of."""
    of_bool, of_int = torch.SymBool.__bool__, torch.SymInt.__bool__

    def truth_of_bool(value: torch.SymBool) -> bool:
        _look(value, branch)
        return of_bool(value)

    def truth_of_int(value: torch.SymInt) -> bool:
        _look(value, branch)
        return of_int(value)

    torch.SymBool.__bool__ = truth_of_bool  # type: ignore[method-assign]
    torch.SymInt.__bool__ = truth_of_int  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.SymBool.__bool__ = of_bool  # type: ignore[method-assign]
        torch.SymInt.__bool__ = of_int  # type: ignore[method-assign]


def _look(value: Any, branch: Callable[[Any], None]) -> None:
    if not is_users(sys._getframe(2).f_code.co_filename):
        return
    expression = value.node.expr
    # Some hold for all sizes: that there are no fewer tokens than none.
    if expression.free_symbols and not (isinstance(value, torch.SymInt) and expression.is_positive):
        branch(expression)
