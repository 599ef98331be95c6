"""Matrices of two dims, which must be whole: diagonals, turns, inverses and the like."""

from __future__ import annotations

import torch

from compiler.placement import Shard
from compiler.rules.rule import Decision, View, dim_of, rule


@rule(torch.diagonal)
def diagonal(view: View) -> Decision | None:
    """Two dims go, and their diagonal is the last dim; of a pending sum each part is one."""
    (x,) = view.tensors
    at, rank = view.at(x), len(view.type(x).shape)
    gone = [dim_of(view.arg(2, "dim1", 0), rank), dim_of(view.arg(3, "dim2", 1), rank)]
    if not isinstance(at, Shard):
        return Decision({x: at}, at)
    if at.dim in gone:
        return None
    return Decision({x: at}, Shard(at.dim - sum(d < at.dim for d in gone), at.units, at.axis))


@rule(torch.diag_embed)
def diag_embed(view: View) -> Decision | None:
    """The last dim goes, and two others come, of which it is the diagonal."""
    (x,) = view.tensors
    at, rank = view.at(x), len(view.type(view.node).shape)
    new = {dim_of(view.arg(2, "dim1", -2), rank), dim_of(view.arg(3, "dim2", -1), rank)}
    if not isinstance(at, Shard):
        return Decision({x: at}, at)
    if at.dim == rank - 2:
        return None
    left = [d for d in range(rank) if d not in new]
    return Decision({x: at}, Shard(left[at.dim], at.units, at.axis))


@rule(torch.rot90)
def rot90(view: View) -> Decision | None:
    """In a plane of two dims."""
    (x,) = view.tensors
    at, rank = view.at(x), len(view.type(x).shape)
    if isinstance(at, Shard) and at.dim in {dim_of(d, rank) for d in view.arg(2, "dims", (0, 1))}:
        return None
    return Decision({x: at}, at)


@rule(torch.linalg.inv, torch.linalg.pinv, torch.linalg.det, torch.linalg.slogdet,
      torch.linalg.cholesky, torch.linalg.qr, torch.linalg.eigh, torch.linalg.eigvalsh,
      torch.linalg.svdvals, torch.linalg.matrix_exp, torch.linalg.matrix_power,
      torch.linalg.matrix_norm)  # fmt: skip
def each_matrix(view: View) -> Decision | None:
    """Of the last two dims; the dims before them keep their places."""
    x, *others = view.tensors
    at, rank = view.whole(x), len(view.type(x).shape)
    types = view.node.meta["type"]
    if others or (isinstance(at, Shard) and at.dim >= rank - 2):
        return None
    if view.node.target is torch.linalg.matrix_norm and view.arg(2, "dim", (-2, -1)) != (-2, -1):
        return None
    return Decision({x: at}, (at,) * len(types) if isinstance(types, tuple) else at)
