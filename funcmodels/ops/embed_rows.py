"""The gradient of an embedding table by its rows, added to what else there is of it at the end.

Autograd would make a table of zeros with those rows, and, where the table is the head's too, a
third one for the sum. Of a large vocabulary and a small model, that is much of a step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = list[tuple[Tensor, Tensor]]  # tokens (n,), and the gradients (n, hidden) of their rows


class Aside:
    """The tables at work, and the rows of their gradients.

    Args:
        tables: leaves that a gradient is taken by, once, by torch.autograd alone.
    """

    def __init__(self, tables: Sequence[Tensor]) -> None:
        self.tables = tables
        self.rows: dict[int, Rows] = {}
        self.places = {id(table): i for i, table in enumerate(tables)}

    def of(self, table: Tensor) -> Rows | None:
        """Where the rows of a table's gradient go; None where autograd has them."""
        place = self.places.get(id(table))
        return None if place is None else self.rows.setdefault(place, [])

    def added(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients by all tables, from those that autograd found beside the rows."""
        found: list[Any] = list(grads)
        del grads
        for i, table in enumerate(self.tables):
            rows = self.rows.pop(i, [])
            if found[i] is None:
                found[i] = torch.zeros_like(table)
            elif rows and not _is_ours(found, i):
                found[i] = found[i].clone()
            for tokens, by_token in rows:
                # A row's own sum first, by autograd's own kernel: to the last bit the same.
                used, place = tokens.unique(return_inverse=True)
                sums = torch.ops.aten.embedding_dense_backward(
                    by_token, place, len(used), -1, False
                )
                found[i].index_add_(0, used, sums)
        return found


_aside: Aside | None = None


@contextmanager
def rows_aside(tables: Sequence[Tensor]) -> Iterator[Aside]:
    """Let `ops.embed` of these tables leave their rows' gradients out of autograd's."""
    global _aside
    before, _aside = _aside, Aside(tables)
    try:
        yield _aside
    finally:
        _aside = before


def embed(tokens: Tensor, table: Tensor) -> Tensor:
    """table[tokens]."""
    if _compiles_or_transforms():
        return F.embedding(tokens, table)
    if _aside is not None:
        rows = _aside.of(table)
        if rows is not None:
            return _Embed.apply(tokens, table, rows)  # type: ignore[return-value]
    return F.embedding(tokens, table)


def _compiles_or_transforms() -> bool:
    """Whether a compiler or a transform is to see a plain lookup.

    A compiled graph may not append to lists: it was broken here, and compiled anew for each step.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor, rows: Rows) -> Tensor:  # type: ignore[override]
        ctx.tokens, ctx.rows = tokens, rows
        return F.embedding(tokens, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        ctx.rows.append((ctx.tokens.reshape(-1), grad.reshape(-1, grad.shape[-1])))
        return None, None, None


def _is_ours(grads: list[Any], i: int) -> bool:
    """Whether nothing else has the memory of a gradient, so that it can be added to in place."""
    grad = grads[i]
    storage = grad.untyped_storage()
    others = (g for j, g in enumerate(grads) if j != i and g is not None)
    shared = any(g.untyped_storage().data_ptr() == storage.data_ptr() for g in others)
    dense = grad.is_contiguous() and storage.nbytes() == grad.nbytes
    # Its memory is the tensor's and `storage`'s; it, the list's, `grad`'s and an argument's.
    alone = torch._C._storage_Use_Count(storage._cdata) <= 2 and sys.getrefcount(grad) <= 3
    return dense and not shared and alone
