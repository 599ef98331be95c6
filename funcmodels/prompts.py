"""Prompts as users give them: one or several, of any lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

from funcmodels.errors import ShapeError

# One prompt, or several, which may differ in length.
Prompts: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]]


def prompts(tokens: Prompts) -> tuple[list[list[int]], bool]:
    """The prompts as lists, and whether there was one only."""
    nested: list[Any] = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    is_single = not nested or isinstance(nested[0], int)
    rows = [[int(t) for t in row] for row in ([nested] if is_single else nested)]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ShapeError(
            f"prompt {empty[0]} is empty",
            need="at least one token a prompt",
            fix="begin it with the beginning-of-sequence token",
        )
    return rows, is_single
