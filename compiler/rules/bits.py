"""The same bits as other numbers: pairs as complex numbers, and one dtype's as another's."""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.placement import Shard
from compiler.rules.rule import Decision, View, rule


@rule(torch.view_as_complex)
def view_as_complex(view: View) -> Decision | None:
    """The last dim, of two numbers, goes: it must be whole."""
    (x,) = view.tensors
    at = view.whole(x)
    if isinstance(at, Shard) and at.dim == len(view.type(x).shape) - 1:
        return None
    return Decision({x: at}, at)


@rule(torch.view_as_real)
def view_as_real(view: View) -> Decision:
    """A further dim at the end; of a pending sum each part is one."""
    (x,) = view.tensors
    return Decision({x: view.at(x)}, view.at(x))


@rule(Tensor.view)
def view_as_dtype(view: View) -> Decision | None:
    """Of another size, each element of the last dim becomes several, or several become one."""
    (x,) = view.tensors
    at, before, after = view.whole(x), view.type(x), view.type(view.node)
    last = len(before.shape) - 1
    if isinstance(at, Shard) and at.dim == last and before.dtype.itemsize < after.dtype.itemsize:
        return None
    return Decision({x: at}, at)
