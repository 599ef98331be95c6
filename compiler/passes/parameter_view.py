"""A parameter seen through reshapes and permutations: which of its dims each dim of a view is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from compiler.ir import Block, tensor_type
from compiler.rewrite import is_call, is_param
from compiler.rules.shapes import order_of, shape_groups

_RESHAPES = (torch.reshape, torch.flatten, torch.unflatten, torch.unsqueeze, torch.squeeze)
_MOVES = (torch.transpose, torch.permute, torch.movedim)


@dataclass(frozen=True)
class Factor:
    """A factor of a dim's size: of index i of the dim it is i // inner % size."""

    dim: int
    size: int
    inner: int = 1


@dataclass(frozen=True)
class ParameterView:
    """A view of a parameter.

    Args:
        param: the `get_attr` node.
        dims: the factors of each dim of the view, major first.
    """

    param: fx.Node
    dims: tuple[tuple[Factor, ...], ...]

    def whole_dims(self, view_dims: Iterable[int]) -> tuple[int, ...] | None:
        """The parameter's own dims that some of the view's are, one after another.

        None where they are no whole dims, or not in the order of their elements.
        """
        shape = tensor_type(self.param).shape
        found: list[int] = []
        below = 1  # how much of the last dim is still to come
        for factor in (f for d in view_dims for f in self.dims[d]):
            end = factor.inner * factor.size
            if below == 1:
                if end != shape[factor.dim]:
                    return None
                found.append(factor.dim)
            elif factor.dim != found[-1] or end != below:
                return None
            below = factor.inner
        return tuple(found) if below == 1 else None


def view_of(node: object) -> ParameterView | None:
    """A parameter or what only rearranges one; None for anything else."""
    if not isinstance(node, fx.Node):
        return None
    if is_param(node):
        shape = tensor_type(node).shape
        return ParameterView(node, tuple((Factor(d, n),) for d, n in enumerate(shape)))  # type: ignore[arg-type]
    if not is_call(node, torch.detach, *_RESHAPES, *_MOVES):
        return None
    (x,) = node.all_input_nodes
    below = view_of(x)
    if below is None or node.target is torch.detach:
        return below
    if node.target in _MOVES:
        return replace(below, dims=tuple(below.dims[d] for d in order_of(node)))
    dims = _reshaped(below.dims, tensor_type(x).shape, tensor_type(node).shape)
    return None if dims is None else replace(below, dims=dims)


def _reshaped(dims: tuple, before: tuple, after: tuple) -> tuple[tuple[Factor, ...], ...] | None:
    """The factors of a reshape's dims."""
    found: dict[int, list[Factor]] = {d: [] for d in range(len(after))}
    for old, new in shape_groups(before, after):
        left = [f for d in old for f in dims[d]]
        for d in new:
            missing = after[d]
            while missing > 1 or (left and left[0].size == 1):
                factor = left.pop(0)
                if factor.size > missing:
                    if factor.size % missing:
                        return None
                    rest = factor.size // missing
                    left.insert(0, replace(factor, size=rest))
                    factor = Factor(factor.dim, missing, factor.inner * rest)
                if missing % factor.size:
                    return None
                missing //= factor.size
                found[d].append(factor)
        if left:
            if not new or prod(f.size for f in left) > 1:
                return None
            found[new[-1]] += left
    return tuple(tuple(found[d]) for d in range(len(after)))


def uses_of(block: Block, param: fx.Node) -> set[fx.Node]:
    """The nodes that use a parameter, through whatever views of it."""

    def users(node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if view_of(user) is None:
                yield user
            else:
                yield from users(user)

    same = [n for n in block.graph.nodes if n.op == "get_attr" and n.target == param.target]
    return {user for node in same for user in users(node)}
