"""Running results of an associative operation, in about 2 log2 of their number of rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcmodels import tree
from funcmodels.block import tracer
from funcmodels.errors import ShapeError, listed
from funcmodels.ops.recurrent_results import check_combined, name_of
from funcmodels.source import users_line


def associative_scan(combine: Callable[[Any, Any], Any], xs: Any, *, dim: int) -> Any:
    """y_t = combine(y_{t-1}, x_t), y_0 = x_0, along a dim.

    Pairs are combined, their results scanned, and the rest filled in: twice the work of a loop, in
    2 log2(n) rounds. For linear recurrences h = a h + b, combine is
    (a1, b1), (a2, b2) -> (a1 a2, a2 b1 + b2). A document begins anew where a is 0.

    Args:
        combine: pure and associative, of two pytrees as xs; elementwise along dim.
        xs: pytree of tensors with one length along dim.
        dim: the dim, as all leaves count it.
    Returns:
        The pytree of running results, shapes of xs.
    Raises:
        ShapeError: leaves of several lengths, a combine that changes what it is given.
    Source: Blelloch 1990, CMU-CS-90-190.
    """
    sizes = {path: x.shape[dim] if isinstance(x, Tensor) else x for path, x in tree.items(xs)}
    n = next(iter(sizes.values()), None)
    if n is None or any(size != n for size in sizes.values()):
        raise ShapeError(
            f"ops.associative_scan by {name_of(combine)}: leaves of several lengths",
            got=listed(f"{path or 'xs'} {n} along dim {dim}" for path, n in sizes.items()),
            need="tensors of one length",
            from_=users_line(),
            fix="what all places share is .expand-ed along the dim",
        )
    record = getattr(tracer(), "call_associative_scan", None)
    if record is not None and isinstance(n, torch.SymInt):
        return record(combine, xs, dim)
    return _scanned(combine, xs, dim)


def _scanned(combine: Callable[[Any, Any], Any], xs: Any, dim: int) -> Any:
    """The scan itself, of pairs."""
    n = tree.leaves(xs)[0].shape[dim]
    if n < 2:
        return xs
    even, odd = (_every_other(xs, dim, start) for start in (0, 1))
    firsts = _first(even, dim, n // 2)
    both = combine(firsts, odd)
    check_combined(combine, both, odd)
    pairs = _scanned(combine, both, dim)  # results at odd places
    rest = _from(even, dim, 1)  # at even places after the first: one more than the odd before
    count = tree.leaves(rest)[0].shape[dim]
    if count:
        rest = combine(_first(pairs, dim, count), rest)
    evens = tree.map(lambda a, b: torch.cat([a, b], dim), _first(even, dim, 1), rest)
    return tree.map(lambda a, b: _weave(a, b, dim), evens, pairs)


def _every_other(xs: Any, dim: int, start: int) -> Any:
    def take(x: Tensor) -> Tensor:
        at = torch.arange(start, x.shape[dim], 2, device=x.device)
        return x.index_select(dim, at)

    return tree.map(take, xs)


def _first(xs: Any, dim: int, n: int) -> Any:
    return tree.map(lambda x: x.narrow(dim, 0, n), xs)


def _from(xs: Any, dim: int, start: int) -> Any:
    return tree.map(lambda x: x.narrow(dim, start, x.shape[dim] - start), xs)


def _weave(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    """even[0], odd[0], even[1], ...; there may be one more of the even."""
    dim = dim % even.ndim
    n = odd.shape[dim]
    both = torch.stack([even.narrow(dim, 0, n), odd], dim=dim + 1).flatten(dim, dim + 1)
    return torch.cat([both, even.narrow(dim, n, even.shape[dim] - n)], dim)
